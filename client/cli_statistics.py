# SPDX-License-Identifier: Apache-2.0
"""What ``fedneuro-node data stats --release`` does beside showing numbers: ask the policy, make the file, say its cost.

With the node's settings the file passes the gate of :mod:`.data.telling` and is signed. Without them it is made for a
hospital that has no node yet: plain numbers only, unsigned, and the coordinator is told so.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from ..privacy.errors import BadInput, FedNeuroError

if TYPE_CHECKING:
    from ..privacy.study import Study
    from .data.statistics import Measured
    from .settings import SiteSettings

__all__ = ["make_release", "node_of"]


def node_of(
    path: Path,
    study: "Study | None",
    config: Path | None,
    *,
    epsilon: float,
    threshold: int,
    site: str,
    signature: bytes,
) -> "SiteSettings | None":
    """The node that signs, once it permits the release: told before hours of reading. None: no node is given.

    Raises:
        BadInput: the study is private and node or ε are not given, or the other way round; the node is another's.
        Refused: the hospital does not permit it.
    """
    private = study is not None and study.privacy.mode != "none"
    if study is not None and private and (config is None or not epsilon):
        raise BadInput(
            f'study {study.study.name} has privacy.mode = "{study.privacy.mode}": numbers of its patients leave with '
            "noise only, paid for from the ledger; give --epsilon, such as 1, and --config node.toml"
        )
    if epsilon and not private:
        raise BadInput("--epsilon belongs to a --release for a --study with privacy; leave it out")
    if config is None:
        return None
    from .data.telling import require_permission
    from .node_settings import load_node_settings

    settings = load_node_settings(config).site_settings()
    if settings.data.resolve() != path.resolve():
        raise BadInput(f"{config}: its node holds {settings.data}, not {path}; give that data set, or its node")
    if site and site != settings.name:
        raise BadInput(f"--site {site}: {config} says {settings.name}; leave --site out")
    require_permission(settings, study, threshold=threshold, epsilon=epsilon, signature=signature)
    return settings


def make_release(
    found: "Measured",
    settings: "SiteSettings | None",
    study: "Study | None",
    *,
    name: str,
    epsilon: float,
    threshold: int,
    signature: bytes,
) -> tuple[str, list[str]]:
    """The text of the file, and what staff should know of it.

    Args:
        found: of the data set.
        settings: as :func:`node_of` gave them.
        study: that it is for, or None.
        name: of the site, where there is no node.
        epsilon: what it may cost each patient, for a private study.
        threshold: patients that a group must have.
        signature: the coordinator's under the study.

    Raises:
        FedNeuroError, OSError: nothing may be handed over.
    """
    from ..privacy.seals import as_text
    from .data.noised import release_noised
    from .data.statistics import release
    from .data.telling import content_of, note_refusal, note_told, require_permission, sealed

    if settings is None:
        told = release(found, name, study, threshold)
        return as_text(content_of(told)), [
            "not signed, as no --config names a node: the coordinator takes it with --unsigned only"
        ]
    if study is None or study.privacy.mode == "none":
        require_permission(settings, study, threshold=threshold, signature=signature)
        try:
            told = release(found, settings.name, study, max(threshold, settings.min_patients))
        except FedNeuroError as error:
            note_refusal(settings, study, error)
            raise
        text = sealed(told, settings)
        note_told(told, settings)
        return text, [f"signed by the node of {settings.name}; in the audit log"]
    answer = release_noised(found, settings, study, epsilon, threshold=threshold, signature=signature)
    lines = ["told before: the same numbers again, which cost nothing"] if answer.again else []
    noised = answer.told
    lines.append(
        f"noise of ±{noised.noise:.1f} patients in each count; cost: ε = {noised.epsilon:g} at δ = {noised.delta:g} "
        f"for each patient, {answer.with_training:.2f} together with the study's training"
    )
    return sealed(noised, settings), [*lines, f"signed by the node of {settings.name}; in the audit log"]

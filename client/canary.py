# SPDX-License-Identifier: Apache-2.0
"""``fedneuro-node rehearse``: a study's first rounds on two of the hospital's own patients, and nothing leaves.

What runs is what will run: the sandboxed child, the gates, training, evaluation, with the study as it is. What differs:

    - no SuperNode and no network: this process answers itself in the coordinator's place
    - a scratch folder holds ledger, cache and state, and is removed: the privacy ledger of the patients is untouched
    - two patients (or as many as are asked for), whose files are linked, not copied
    - a study with mode ``distributed`` needs other hospitals; its rehearsal trains with mode ``local``

Nothing that a rehearsal prints is for the coordinator: it holds exact figures of two patients.
"""

import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..privacy.contract import Arrays, EvaluateReply, Refusal, Request, Role, TrainReply
from ..privacy.errors import BadInput, FedNeuroError
from ..privacy.study import Study
from ..privacy.wire_layout import read_reply
from .node_settings import NodeSettings
from .run_folder import RunFolder
from .sandbox import Walls
from .sandboxed_site import SandboxedSite
from .settings import SiteSettings
from .training_child import Caps, TrainingChild

__all__ = ["Rehearsal", "rehearse"]


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """How it went.

    Args:
        patients: names of those that were used.
        seconds: of each round.
        metrics: names of the metrics that the last evaluation gave.
        walls: of the process that trained.
    """

    patients: tuple[str, ...]
    seconds: tuple[float, ...]
    metrics: tuple[str, ...]
    walls: Walls | None


def rehearse(
    settings: NodeSettings,
    study: Study,
    *,
    rounds: int = 1,
    patients: int = 2,
    tell: Callable[[str], None] = lambda _: None,
) -> Rehearsal:
    """Rehearse ``study``.

    Args:
        settings: the node's; only its data, role and sandbox are used.
        study: the study.
        rounds: how many of its rounds.
        patients: how many of the data set's patients, the first by name.
        tell: takes a line about each step.

    Raises:
        FedNeuroError: the study would not run here; as it would be written to the node's log.
    """
    site = settings.site_settings()
    if study.privacy.mode == "distributed":
        study = Study.parse({**study.model_dump(mode="json"), "privacy": _local(study)})
        tell("mode distributed needs other hospitals: the rehearsal trains with mode local")
    folder = RunFolder(site.state)
    folder.make()
    with tempfile.TemporaryDirectory(prefix="rehearsal-", dir=folder.scratch) as name:
        scratch = Path(name)
        names = _link_patients(site.data, scratch / "data", patients)
        tell(f"patients {', '.join(names)}; ledger and cache in a scratch folder")
        own = SiteSettings(
            name=site.name,
            data=scratch / "data",
            state=scratch / "state",
            role=site.role,
            public_size=site.public_size,
        )
        isolate = settings.sandbox.isolation != "off"
        child = TrainingChild(own, Caps(isolate=isolate), scratch / "tmp")
        node = SandboxedSite(child)
        try:
            return _rounds(node, study, min(rounds, study.training.rounds), names, tell)
        finally:
            node.close()


def _local(study: Study) -> dict[str, object]:
    values = study.privacy.model_dump(mode="json")
    return {**values, "mode": "local"}


def _rounds(
    node: SandboxedSite, study: Study, rounds: int, names: tuple[str, ...], tell: Callable[[str], None]
) -> Rehearsal:
    from ..models.networks import build_network
    from ..models.state import to_arrays

    _ask(node, Request(kind="hello", study=study))
    tell("the data fit the study")
    network = build_network(
        study.model, in_channels=len(study.data.modalities), out_channels=study.task.channels, seed=study.study.seed
    )
    arrays: Arrays = to_arrays(network)
    seconds: list[float] = []
    for number in range(1, rounds + 1) if node.settings.role is Role.TRAIN else ():
        started = time.monotonic()
        reply = _ask(node, Request(kind="train", study=study, round=number, arrays=arrays))
        if not isinstance(reply, TrainReply):
            raise FedNeuroError(f"a train request was answered with {type(reply).__name__}")
        arrays = {**arrays, **read_reply(study, arrays, reply.arrays)}
        seconds.append(time.monotonic() - started)
        spent = f", ε {reply.epsilon:.3f} of a scratch ledger" if reply.epsilon is not None else ""
        tell(f"round {number}: {reply.steps} steps in {seconds[-1]:.1f} s{spent}")
    reply = _ask(node, Request(kind="evaluate", study=study, round=len(seconds), arrays=arrays))
    metrics = tuple(sorted(reply.metrics)) if isinstance(reply, EvaluateReply) else ()
    tell(f"evaluated: {', '.join(metrics) or 'every metric withheld, as for so few patients it must be'}")
    return Rehearsal(names, tuple(seconds), metrics, node.child.walls)


def _ask(node: SandboxedSite, request: Request) -> object:
    reply = node.handle(request)
    if isinstance(reply, Refusal):
        raise _fault(node.settings.state / "last-fault.json", reply)
    return reply


def _fault(path: Path, refusal: Refusal) -> FedNeuroError:
    """The error that the site wrote down, with its exit code."""
    import json

    from .training_child import ChildFault

    try:
        fault = json.loads(path.read_text(encoding="utf-8"))
        text, code = str(fault["text"]), int(fault["exit_code"])
    except (OSError, ValueError, KeyError):
        text, code = refusal.reason.public_text, BadInput.exit_code
    return ChildFault(f"{refusal.kind} of round {refusal.round}: {text}", refusal.reason, code)


def _link_patients(data: Path, target: Path, count: int) -> tuple[str, ...]:
    """A data set of links to the first ``count`` patients; returns their names.

    Raises:
        BadInput: there are not so many.
    """
    found = sorted(path.name for path in data.glob("sub-*") if path.is_dir())
    if len(found) < count:
        raise BadInput(f"{data}: holds {len(found)} patients (sub-*); a rehearsal needs {count}")
    chosen = found[:count]
    target.mkdir(parents=True)
    for path in sorted(data.iterdir()):
        if path.is_file() and path.name != "participants.tsv":
            shutil.copyfile(path, target / path.name)
    for folder in (Path(), *(path.relative_to(data) for path in sorted(data.glob("derivatives/*")) if path.is_dir())):
        for name in chosen:
            if (data / folder / name).is_dir():
                (target / folder).mkdir(parents=True, exist_ok=True)
                (target / folder / name).symlink_to(data / folder / name, target_is_directory=True)
    table = data / "participants.tsv"
    if table.is_file():
        head, *rows = table.read_text(encoding="utf-8-sig").splitlines()
        kept = [row for row in rows if row.split("\t")[0] in chosen]
        (target / "participants.tsv").write_text("\n".join([head, *kept]) + "\n", encoding="utf-8")
    return tuple(chosen)

# SPDX-License-Identifier: Apache-2.0
"""What a federated model is compared with on the same patients: names for ``--compare``, and the studies behind them.

=================  ================================================================================================
``local``          each hospital's own model: its patients alone, as many steps as it takes in the federation
``pooled``         one hospital that has all training patients; as many patients' visits as the whole federation
``untrained``      the model of round 0, before any training here
``majority``       classification: the class that most training patients have, for everyone
``fine-tuned``     the federated model, trained on at one hospital: a quarter of the rounds, a tenth of the step size
``no-privacy``     the same federation without a promise
``previous:FILE``  an earlier model of the same network, a ``model.safetensors``
=================  ================================================================================================

All of them are studies like any other, run by the same engine: nothing is trained by other code. Under privacy, a
comparator is trained under the same ε; ``distributed`` becomes ``local`` where there is one hospital alone.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ..privacy.errors import StudyError
from ..privacy.study import Study

__all__ = [
    "KINDS",
    "Comparators",
    "fine_tuned_study",
    "heldout_study",
    "local_study",
    "open_study",
    "parse_compare",
    "pooled_study",
    "scoring_study",
]

KINDS: Final = ("local", "pooled", "untrained", "majority", "fine-tuned", "no-privacy", "previous")
FINE_TUNE_ROUNDS: Final = 4
FINE_TUNE_RATE: Final = 10
LONGEST_NAME: Final = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparators:
    """What ``--compare`` asked for, in the order of :data:`KINDS`; ``previous`` is the file of an earlier model."""

    kinds: tuple[str, ...] = ()
    previous: str = ""


def parse_compare(text: str, study: Study) -> Comparators:
    """Read ``--compare local,pooled,previous:FILE``.

    Raises:
        StudyError: an unknown name, or one that does not suit the study.
    """
    kinds, previous = [], ""
    for part in filter(None, (part.strip() for part in text.split(","))):
        kind, _, rest = part.partition(":")
        if kind not in KINDS or bool(rest) != (kind == "previous"):
            raise StudyError(f'--compare "{part}": expected names out of {", ".join(KINDS[:-1])} or previous:FILE')
        previous = rest or previous
        kinds.append(kind)
    if "majority" in kinds and study.task.kind != "classification":
        raise StudyError('--compare majority: needs task.kind = "classification"; for segmentation use untrained')
    if "no-privacy" in kinds and study.privacy.mode == "none":
        raise StudyError('--compare no-privacy: the study has privacy.mode = "none" already; leave it out')
    if previous and not Path(previous).is_file():
        raise StudyError(f"--compare previous:{previous}: no such file; give a model.safetensors of the same network")
    return Comparators(kinds=tuple(kind for kind in KINDS if kind in kinds), previous=previous)


def heldout_study(study: Study, heldout: Sequence[str], *, seed: int) -> Study:
    """The study with other sites held out, and another seed."""
    return _changed(study, "", {"evaluation": {"heldout": sorted(heldout)}, "study": {"seed": seed}})


def local_study(study: Study) -> Study:
    """One hospital alone: the steps that it takes in the federation."""
    return _changed(study, "local", _alone(study))


def pooled_study(study: Study, sites: int) -> Study:
    """All training patients in one hospital, which visits as many patients as ``sites`` hospitals do.

    Epochs and private steps (which take a share of all patients) do so as they are; plain steps of a fixed batch are
    multiplied by the number of hospitals.
    """
    training = {}
    if study.training.local_steps and study.privacy.mode == "none":
        training = {"local_steps": study.training.local_steps * sites}
    return _changed(study, "pooled", _alone(study) | {"training": training})


def open_study(study: Study) -> Study:
    """The same federation without a promise."""
    return _changed(study, "no-privacy", {"privacy": _OPEN})


def fine_tuned_study(study: Study, model: Path) -> Study:
    """Training goes on at one hospital from ``model``, more gently and not for long.

    Raises:
        StudyError: the file cannot be read.
    """
    try:
        digest = hashlib.sha256(model.read_bytes()).hexdigest()
    except OSError as error:
        raise StudyError(f"{model}: cannot be read ({error.strerror or error}); run the study again") from error
    training: dict[str, Any] = {
        "rounds": max(1, study.training.rounds // FINE_TUNE_ROUNDS),
        "learning_rate": study.training.learning_rate / FINE_TUNE_RATE,
        "init": {"from": "checkpoint", "path": str(model.resolve()), "sha256": digest},
    }
    return _changed(study, "fine-tuned", _alone(study) | {"training": training})


def scoring_study(study: Study, sites: Sequence[str]) -> Study:
    """A study that only judges, at sites that are all held out; nothing is released, so nothing is withheld."""
    evaluation = {"heldout": sorted(sites), "min_patients": 1, "previews": 0, "worst": 0}
    return _changed(study, "scoring", {"evaluation": evaluation, "privacy": _OPEN})


_OPEN: Final[Mapping[str, Any]] = {"mode": "none", "tolerate": 0, "metrics": "suppress"}


def _alone(study: Study) -> dict[str, Any]:
    """What changes where one hospital trains: nobody is held out or waited for."""
    privacy = {"mode": "local", "tolerate": 0} if study.privacy.mode == "distributed" else {}
    return {"evaluation": {"heldout": [], "worst": 0}, "strategy": {"min_sites": 0}, "privacy": privacy}


def _changed(study: Study, suffix: str, changes: Mapping[str, Mapping[str, Any]]) -> Study:
    values = study.model_dump(mode="json", by_alias=True)
    if study.training.init.path:
        values["training"]["init"]["path"] = study.training.init.path  # no part of the canonical form
    for section, keys in changes.items():
        for key, value in keys.items():
            old = values[section].get(key)
            values[section][key] = {**old, **value} if isinstance(old, dict) and isinstance(value, dict) else value
    if suffix:
        values["study"]["name"] = f"{study.study.name[: LONGEST_NAME - len(suffix) - 1]}-{suffix}"
    return Study.parse(values)

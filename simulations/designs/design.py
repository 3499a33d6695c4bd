# SPDX-License-Identifier: Apache-2.0
"""Runs a design from one command, and builds its evidence again from what is saved.

``OUT/design.json`` says which design of which study lies in a folder, with its folds, and what became of each task. The
same command again goes on where it was; another design in the same folder is refused.

    1. folds are laid out, and design.json is written
    2. federations and comparators run side by side, then what starts from them, then models are judged at sites
    3. evidence, tables and report are written from what is there, also after failures
"""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from ...privacy.errors import FedNeuroError, StateError
from ...privacy.folders import require_folder
from ...privacy.study import Study
from ...server.statistics.evidence import build_evidence
from ..comparators import Comparators
from ..sites import find_sites
from .cohort import cohort_rows, majority_class, traits_of
from .collect import gather
from .execute import Failure, Told, execute, failures_text
from .plan import Design, Fold, Plan, cv_folds, loso_folds, run_fold
from .tasks import RunTask, ScoreTask, Task, read_results

__all__ = [
    "DESIGN",
    "MARGIN",
    "Options",
    "evidence_of",
    "load_design",
    "load_kind",
    "perform",
    "prepare",
    "raise_failures",
]

DESIGN: Final = "design.json"
SCHEMA_VERSION: Final = 1
_KEYS: Final = {"design", "asked", "study", "folds", "cohort", "traits", "majority", "tasks"}
MARGIN: Final = 0.02
"""Margin of "not worse than" in the headline metric's unit: two points of Dice."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What a design was asked for, besides its study and sites."""

    compare: Comparators = field(default_factory=Comparators)
    seeds: int = 1
    folds: int = 5
    margin: float = MARGIN


def prepare(design: Design, study: Study, sites: Path, out: Path, options: Options, *, overwrite: bool = False) -> Plan:
    """Step 1.

    Raises:
        StateError: ``out`` holds another design, or something else.
        DataError, StudyError: the sites or the study do not suit the design.
    """
    require_folder(out)
    found = find_sites(sites)
    root = out / "comparators" if design == "run" else out
    asked = _asked(design, study, found, options)
    path = root / DESIGN
    old = _read(path)
    if path.exists() and old is None and not overwrite:
        raise StateError(f"{path}: cut or of another schema; remove it, or start anew with --overwrite")
    if old is not None and old["asked"] != asked and not overwrite:
        changed = ", ".join(key for key in asked if old["asked"].get(key) != asked[key])
        what = f"holds another design, {old['design']} ({changed} differ)"
        raise StateError(f"{out}: {what}; give another --out, or start anew with --overwrite")
    if overwrite and design != "run":
        for name in ("runs", "scores", "data"):
            shutil.rmtree(root / name, ignore_errors=True)
    if design == "run":
        folds = [run_fold(study, found)]
    elif design == "loso":
        folds = loso_folds(study, found, options.seeds)
    else:
        folds = cv_folds(study, found, options.seeds, folds=options.folds, data=root / "data")
    traits = traits_of(found, study)
    values = {
        "schema_version": SCHEMA_VERSION,
        "design": design,
        "asked": asked,
        "study": study.model_dump(mode="json", by_alias=True) | _checkpoint(study),
        "folds": [fold.json() for fold in folds],
        "cohort": cohort_rows(found, traits),
        "traits": traits,
        "majority": {f.name: majority_class(f.train, study) for f in folds if "majority" in options.compare.kinds},
        "tasks": (old or {}).get("tasks", {}) if not overwrite else {},
    }
    root.mkdir(parents=True, exist_ok=True)
    _write(path, values)
    return _plan(values, out)


def load_kind(out: Path) -> str:
    """Which design lies in ``out``: ``loso``, ``cv`` or ``sweep``.

    Raises:
        StateError: its file is cut.
    """
    try:
        return str(json.loads((out / DESIGN).read_text(encoding="utf-8"))["design"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        text = f"{out / DESIGN}: cut or no design; run the design again with --overwrite"
        raise StateError(text) from error


def load_design(out: Path, *, inside: str = "") -> tuple[Plan, dict[str, Any]]:
    """The design that lies in ``out`` (or its sub-folder ``inside``), and the content of its file.

    Raises:
        StateError: there is none, or its file is cut or of another schema.
    """
    path = (out / inside if inside else out) / DESIGN
    values = _read(path)
    if values is None:
        what = "is cut or of another schema; run the design again with --overwrite" if path.exists() else "is not there"
        raise StateError(f"{path}: {what}")
    return _plan(values, out), values


def perform(plan: Plan, *, workers: int, tell: Told, begin: Callable[[list[Task]], None]) -> dict[str, Failure]:
    """Step 2; returns the failures by task.

    Args:
        plan: the design.
        workers: processes.
        tell: told of events.
        begin: told of the tasks of each stage that are to be done.
    """
    failures: dict[str, Failure] = {}
    cache = plan.root / "cache"
    plan.make_data()
    stages: list[Callable[[], list[Task]]] = [
        lambda: list(plan.first()),
        lambda: list(plan.second()),
        lambda: [task for _, _, task in plan.scores() if _source_is_there(task)],
    ]
    for stage in stages:
        tasks = [task for task in stage() if not task.done()]
        begin(tasks)
        found = execute(tasks, cache=cache, workers=workers, tell=tell)
        failures |= found
        _note_tasks(plan.root / DESIGN, tasks, found)
    return failures


def evidence_of(plan: Plan, values: Mapping[str, Any]) -> dict[str, Any]:
    """Step 3: what is known now, from the saved files alone."""
    judged = gather(plan, traits=values["traits"], majority=values["majority"])
    found = build_evidence(
        judged, seed=plan.study.study.seed, resamples=plan.study.evaluation.bootstrap, margin=values["asked"]["margin"]
    )
    failed = {name: task["error"] for name, task in values["tasks"].items() if task.get("error")}
    runs = [*map(plan.federation, plan.folds), *plan.first(), *plan.second()]
    return found | {
        "design": plan.design,
        "cohort": values["cohort"],
        "failures": failed,
        "steps": {task.name: _effort(task) for task in runs},
    }


def raise_failures(failures: Mapping[str, Failure]) -> None:
    """End the command as its worst task did.

    Raises:
        FedNeuroError: any task failed.
    """
    if failures:
        error = FedNeuroError(failures_text(failures))
        error.exit_code = max(failure.exit_code for failure in failures.values())  # type: ignore[misc]
        raise error


def _effort(task: RunTask) -> dict[str, Any]:
    """What a run took."""
    found = read_results(task.folder) or {}
    training = task.study.training
    return {
        "rounds": training.rounds,
        "steps_per_round": training.local_steps or f"{training.local_epochs} epochs",
        "hospitals": sum(name not in task.study.evaluation.heldout for name in task.sites),
        "seconds": found.get("seconds"),
        "status": found.get("status", "not run"),
        "study_hash": task.study.hash,
        "model_digest": found.get("model_digest"),
    }


def _source_is_there(task: ScoreTask) -> bool:
    return task.source != "run" or (task.model / "model.safetensors").is_file()


def _asked(design: str, study: Study, sites: Mapping[str, Path], options: Options) -> dict[str, Any]:
    return {
        "design": design,
        "study": study.hash,
        "sites": sorted(sites),
        "compare": list(options.compare.kinds),
        "previous": options.compare.previous,
        "seeds": options.seeds,
        "folds": options.folds if design == "cv" else 0,
        "margin": options.margin,
    }


def _plan(values: Mapping[str, Any], out: Path) -> Plan:
    asked, design = values["asked"], values["design"]
    return Plan(
        design=design,
        study=Study.parse(dict(values["study"])),
        folds=[Fold.of(fold) for fold in values["folds"]],
        compare=Comparators(kinds=tuple(asked["compare"]), previous=asked["previous"]),
        root=out / "comparators" if design == "run" else out,
        out=out,
    )


def _checkpoint(study: Study) -> dict[str, Any]:
    """The training section with the path of its checkpoint, which the canonical form leaves out."""
    if not study.training.init.path:
        return {}
    training = study.model_dump(mode="json", by_alias=True)["training"]
    training["init"]["path"] = study.training.init.path
    return {"training": training}


def _note_tasks(path: Path, tasks: list[Task], failures: Mapping[str, Failure]) -> None:
    values = _read(path)
    if values is None:
        return
    for task in tasks:
        error = failures[task.name].text if task.name in failures else ""
        values["tasks"][task.name] = {"done": not error, "error": error}
    _write(path, values)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    good = isinstance(values, dict) and values.get("schema_version") == SCHEMA_VERSION
    return values if good and set(values) >= _KEYS else None


def _write(path: Path, values: Mapping[str, Any]) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(values, indent=1, ensure_ascii=False), encoding="utf-8")
    temporary.replace(path)

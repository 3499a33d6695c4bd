# SPDX-License-Identifier: Apache-2.0
"""A search over settings: each trial is a run in a folder of its own, chosen by what *training* hospitals say.

Held-out hospitals are judged and shown, but never choose: a setting that was picked by them would not be held out any
more. Under privacy every trial spends ε anew; a search on patients composes, so it belongs on phantoms or public data.
"""

import importlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from ...models.metrics import higher_is_better
from ...privacy.errors import EnvironmentProblem, StateError, StudyError
from ...privacy.folders import require_folder
from ...privacy.study import Study
from ...privacy.study_file import load_study
from ..sites import find_sites
from .execute import Failure, Told, execute
from .space import Draw, Space, toml_text
from .tasks import RunTask, Task, read_results

__all__ = ["SWEEP", "load_sweep", "run_sweep", "value_of"]

SWEEP: Final = "design.json"
SCHEMA_VERSION: Final = 1


def run_sweep(
    study: Path,
    overrides: Sequence[str],
    sites: Path,
    out: Path,
    space: Space,
    *,
    workers: int,
    overwrite: bool,
    begin: Callable[[list[Task]], None],
    tell: Told,
) -> dict[str, Failure]:
    """Run the trials that are not done; returns the failures.

    Raises:
        StateError: ``out`` holds another search.
        StudyError: a setting is not valid, or nothing can choose between trials.
        EnvironmentProblem: Optuna is not installed.
    """
    base = load_study(study, overrides)
    if base.select_metric == "last":
        raise StudyError('sweep: evaluation.select = "last" chooses nothing; name a metric of training hospitals')
    found = find_sites(sites)
    asked = {
        "design": "sweep", "study": base.hash, "sites": sorted(found), "compare": [], "seeds": space.seeds,
        "varied": space.keys, "search": space.search, "trials": space.trials if space.draws else 0,
        "space": [[key, list(values)] for key, values in space.grids]
        + [[draw.key, draw.kind, list(draw.values)] for draw in space.draws],
    }  # fmt: skip
    values = _open(out, asked, base, overwrite)

    def task(setting: dict[str, Any], number: int, seed: int) -> RunTask:
        texts = [f"{key}={toml_text(value)}" for key, value in setting.items()]
        texts += [f"study.seed={base.study.seed + seed}"] if space.seeds > 1 else []
        name = f"trial-{number + 1:03d}" + (f"-seed{base.study.seed + seed}" if space.seeds > 1 else "")
        loaded = load_study(study, [*overrides, *texts])
        return RunTask(name=name, study=loaded, sites=found, folder=out / "runs" / name)

    def perform(settings: Sequence[tuple[int, dict[str, Any]]]) -> dict[str, Failure]:
        tasks = [(k, s, task(s, k, seed)) for k, s in settings for seed in range(space.seeds)]
        for number, setting, one in tasks:
            values["trials"][one.name] = {
                "number": number, "setting": setting, "seed": one.study.study.seed, "study": one.study.hash,
                "error": "",
            }  # fmt: skip
        _write(out / SWEEP, values)
        pending: list[Task] = [one for _, _, one in tasks if not one.done()]
        begin(pending)
        failures = execute(pending, cache=out / "cache", workers=workers, tell=tell)
        for name, failure in failures.items():
            values["trials"][name]["error"] = failure.text
        _write(out / SWEEP, values)
        return failures

    if space.search == "optuna":
        return _by_optuna(space, base, out, values, workers, perform)
    return perform(list(enumerate(space.settings(base.study.seed))))


def load_sweep(out: Path) -> dict[str, Any]:
    """The content of a search's file.

    Raises:
        StateError: it is cut, or of another schema.
    """
    try:
        values: dict[str, Any] = json.loads((out / SWEEP).read_text(encoding="utf-8"))
        good = values["schema_version"] == SCHEMA_VERSION and values["design"] == "sweep"
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StateError(f"{out / SWEEP}: cut or of another schema; run the search again with --overwrite") from error
    if not good:
        raise StateError(f"{out / SWEEP}: of another schema or design; give the folder of a search")
    return values


def value_of(folder: Path, study_hash: str) -> float | None:
    """The number that a trial is judged by; None where its run is not complete or had no validation patient."""
    found = read_results(folder)
    if not found or found["study_hash"] != study_hash or found["status"] != "complete":
        return None
    value: float | None = found["select"]["value"]
    return value


def _by_optuna(
    space: Space,
    base: Study,
    out: Path,
    values: dict[str, Any],
    workers: int,
    perform: Callable[[Sequence[tuple[int, dict[str, Any]]]], dict[str, Failure]],
) -> dict[str, Failure]:
    """Ask Optuna for as many settings as there are workers, run them, tell it; those of an earlier start come first."""
    try:
        optuna: Any = importlib.import_module("optuna")  # no dependency of ours
    except ImportError as error:
        text = "--search optuna: Optuna is not installed; pip install 'fedneuro[search]', or take --search random"
        raise EnvironmentProblem(text) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    direction = "maximize" if higher_is_better[base.select_metric] else "minimize"
    known: dict[int, dict[str, Any]] = {t["number"]: t["setting"] for t in values["trials"].values()}
    # A search that goes on must not draw again what it drew when it began.
    sampler = optuna.samplers.TPESampler(seed=base.study.seed + len(known))
    study = optuna.create_study(direction=direction, sampler=sampler)
    spaces = {draw.key: _distribution(optuna, draw) for draw in space.draws}
    failures: dict[str, Failure] = {}
    if known:
        failures |= perform(sorted(known.items()))
    for number, setting in sorted(known.items()):
        value = _mean_value(values, out, number)
        state = optuna.trial.TrialState.COMPLETE if value is not None else optuna.trial.TrialState.FAIL
        study.add_trial(optuna.trial.create_trial(params=setting, distributions=spaces, value=value, state=state))
    while len(known) < space.trials:
        count = min(max(1, workers // space.seeds), space.trials - len(known))
        asked = [study.ask(spaces) for _ in range(count)]
        first = len(known)
        batch = [(first + k, dict(trial.params)) for k, trial in enumerate(asked)]
        failures |= perform(batch)
        for trial, (number, setting) in zip(asked, batch, strict=True):
            known[number] = setting
            value = _mean_value(values, out, number)
            study.tell(trial, value, state=None if value is not None else optuna.trial.TrialState.FAIL)
    return failures


def _mean_value(values: dict[str, Any], out: Path, number: int) -> float | None:
    """Mean over seeds of a setting's value."""
    trials = [(name, t) for name, t in values["trials"].items() if t["number"] == number]
    found = [value_of(out / "runs" / name, t["study"]) for name, t in trials]
    known = [value for value in found if value is not None]
    return sum(known) / len(known) if known else None


def _distribution(optuna: Any, draw: Draw) -> Any:
    kinds = optuna.distributions
    if draw.kind == "choice":
        return kinds.CategoricalDistribution(list(draw.values))
    if draw.kind == "int":
        return kinds.IntDistribution(*draw.values)
    return kinds.FloatDistribution(*draw.values, log=draw.kind == "log")


def _open(out: Path, asked: dict[str, Any], base: Study, overwrite: bool) -> dict[str, Any]:
    """The content of the search's file, new or as it was left."""
    path = out / SWEEP
    fresh = {
        "schema_version": SCHEMA_VERSION, "design": "sweep", "asked": asked,
        "study": base.model_dump(mode="json", by_alias=True), "trials": {},
    }  # fmt: skip
    if path.exists() and not overwrite:
        old = load_sweep(out)
        if old["asked"] != json.loads(json.dumps(asked)):
            changed = ", ".join(key for key in asked if old["asked"].get(key) != asked[key])
            what = f"holds another search ({changed} differ)"
            raise StateError(f"{out}: {what}; give another --out, or start anew with --overwrite")
        return old
    require_folder(out)
    out.mkdir(parents=True, exist_ok=True)
    _write(path, fresh)
    return fresh


def _write(path: Path, values: dict[str, Any]) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(values, indent=1, ensure_ascii=False), encoding="utf-8")
    temporary.replace(path)

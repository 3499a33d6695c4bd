# SPDX-License-Identifier: Apache-2.0
"""From the folders of a design to :class:`fedneuro.server.statistics.evidence.Judged`: who was judged by which model.

Reads the files ``patient-scores.json`` alone, so evidence can be built again at any time, and of a design that is not
finished; what is missing is told in a note.
"""

import json
import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from ...client.patient_scores import FILE
from ...models.metrics import bounds_of, higher_is_better, metric_of
from ...server.statistics.evidence import INSIDE, OURS, Judged
from ...server.statistics.strata import Traits, cell
from .links import read_index
from .plan import Fold, Plan

__all__ = ["TITLES", "gather", "main_metric_of", "more_is_better"]

TITLES: Mapping[str, str] = {
    OURS: "federated",
    INSIDE: "federated, where the site trained",
    "pooled": "pooled training",
    "untrained": "before training",
    "majority": "majority class",
    "fine-tuned": "fine-tuned at the site",
    "no-privacy": "federated without privacy",
    "previous": "previous release",
}

Records = dict[str, dict[str, dict[str, dict[str, dict[str, list[Any]]]]]]
"""As :data:`Scores`, of AUROC and concordance: what a patient's rank rests on, one per fold."""
_NO_METRIC: Final = frozenset({"class", "failures", "predicted", "observed", "event", "reference_ml"})
_NO_METRICS: Final = ("probability_", "absent_")
"""Values of patients that are not a metric, and how their names begin."""
_ABSENT: Final = "absent_"
Scores = dict[str, dict[str, dict[str, dict[str, dict[str, list[float | None]]]]]]
"""Metric: seed: model: hospital: patient: values, one per fold."""


def gather(plan: Plan, *, traits: Traits, majority: Mapping[str, int | None]) -> Judged:
    """Everything that the design's folders hold on patients.

    Args:
        plan: the design.
        traits: of patients, for strata.
        majority: class that most training patients have, by fold.
    """
    scores: Scores = {}
    records: Records = {}
    notes: list[str] = []
    missing: list[str] = []
    drawn: dict[str, dict[str, Mapping[str, Any]]] = {}
    said: Said = {}
    done: set[Path] = set()
    for fold in plan.folds:
        for model, path, hospital, index in _places(plan, fold):
            if path in done:
                continue
            done.add(path)
            patients = _read(path, model, hospital or "the pool", notes, missing)
            if failed := sum("failures" in values for values in patients.values()):
                what = f"{failed} of {len(patients)} patients; they count with the worst value"
                notes.append(f"{TITLES.get(model, model)} at {hospital or 'the pool'}: inference failed on {what}")
            for patient, values in patients.items():
                site, own = index.get(patient, (hospital, patient)) if index or not hospital else (hospital, patient)
                _add(scores, fold.seed, model, site, own, values)
                drawn.setdefault(site, {}).setdefault(own, values)
                _add_answer(said, fold.seed, model, site, values)
                _add_record(records, fold.seed, model, site, own, values)
                if model == OURS and "majority" in plan.compare.kinds and "class" in values:
                    guess = majority.get(fold.name)
                    right = None if guess is None else float(values["class"] == guess)
                    _add(scores, fold.seed, "majority", site, own, {"accuracy": right})
                    if guess is not None:  # the same for everyone: it ranks nobody
                        same = {f"probability_{k}": float(k == guess) for k in range(len(plan.study.task.labels))}
                        _add_record(records, fold.seed, "majority", site, own, {"class": values["class"], **same})
    if missing:
        text = f"not judged yet, or they could not be ({len(missing)}): {'; '.join(missing)}"
        notes.append(f"{text}; the same command goes on")
    hospitals = _hospitals(plan)
    found = {model for seeds in [*scores.values(), *records.values()] for tables in seeds.values() for model in tables}
    ranked = {m: seeds for m, seeds in records.items() if m in plan.study.metric_names}
    titles = {OURS: TITLES[OURS]}
    titles |= {f"local: {h}": f"local, {h} alone" for h in hospitals if f"local: {h}" in found}
    titles |= {model: title for model, title in TITLES.items() if model in found and model not in titles}
    if "previous" in found:
        notes.append("previous release: nothing is known of whom it was trained on; these patients may be among them")
    if "majority" in plan.compare.kinds and any(guess is None for guess in majority.values()):
        notes.append("majority class: unknown in a fold, as participants.tsv of the training hospitals names no class")
    notes += [*_empty_notes(plan, drawn), *_class_notes(plan, drawn), *_alike_notes(said)]
    heldout = [fold.hospital[name] for fold in plan.folds for name in fold.tests]
    return Judged(
        metrics={
            metric: [_averaged(tables) for _, tables in sorted(seeds.items())] for metric, seeds in scores.items()
        },
        titles=titles,
        sites=[*dict.fromkeys(heldout), *(h for h in hospitals if h not in heldout)],
        ranked={
            metric: [_averaged_records(tables) for _, tables in sorted(seeds.items())]
            for metric, seeds in ranked.items()
        },
        main=main_metric_of(plan, {*scores, *ranked}),
        better={metric: more_is_better(metric) for metric in scores},
        bounds={metric: bounds for metric in scores if (bounds := bounds_of(metric))},
        method=None if plan.study.evaluation.interval == "auto" else plan.study.evaluation.interval,
        traits=_with_sizes(traits, drawn, plan.study.evaluation.size_cuts),
        heldout=list(dict.fromkeys(heldout)),
        notes=notes,
    )


def main_metric_of(plan: Plan, known: set[str]) -> str:
    """The metric of the headline: the selecting one where it is known here, else the first that is."""
    wanted = [plan.study.select_metric, *plan.study.metric_names, "accuracy", *sorted(known)]
    return next((metric for metric in wanted if metric in known), plan.study.metric_names[0])


def more_is_better(metric: str) -> bool:
    """Direction of a metric or of one of its labels (``dice_anterior``)."""
    return higher_is_better.get(metric_of(metric), True)


Place = tuple[str, Path, str, Mapping[str, tuple[str, str]]]
"""Model, file, hospital (empty: the index says), index of linked patients."""


def _places(plan: Plan, fold: Fold) -> Iterator[Place]:
    """Where a fold's values are."""
    federations = [(OURS, INSIDE, plan.federation(fold).folder)]
    if "no-privacy" in plan.compare.kinds:
        federations.append(("no-privacy", "", plan.unprotected(fold).folder))
    for model, inside, folder in federations:
        for name in fold.tests:
            yield model, _file(folder, name), fold.hospital[name], {}
        where = model if plan.design == "run" else inside
        for name in fold.train if where else ():
            yield where, _file(folder, name), name, {}
    yield from _own_places(plan, fold)
    for of, model, task in plan.scores():
        if of is fold:
            for name in task.sites:
                yield model, _file(task.folder, name), fold.hospital.get(name, name), {}


def _own_places(plan: Plan, fold: Fold) -> Iterator[Place]:
    """Validation patients of the comparators' own runs."""
    kinds = plan.compare.kinds
    if "local" in kinds and plan.design != "cv":
        for name in fold.train:
            yield f"local: {name}", _file(plan.local(fold, name).folder, name), name, {}
    if "pooled" in kinds and plan.design == "run":
        yield "pooled", _file(plan.pooled(fold).folder, "pooled"), "", read_index(plan.pool(fold))
    if "fine-tuned" in kinds and plan.federation(fold).done():
        for name in plan.whole(fold):
            yield "fine-tuned", _file(plan.fine_tuned(fold, name).folder, name), name, {}


def _file(folder: Path, site: str) -> Path:
    return folder / "sites" / site / FILE


def _read(path: Path, model: str, hospital: str, notes: list[str], missing: list[str]) -> dict[str, dict[str, Any]]:
    """Patients' values; a note and none where the file is missing, cut or of another schema."""
    what = f"{model} at {hospital}"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        missing.append(what)
        return {}
    except ValueError:
        notes.append(f"{what}: {path} is cut or no JSON; remove {path.parents[2]}, and the same command makes it again")
        return {}
    if not isinstance(found, dict) or found.get("schema_version") != 1 or not isinstance(found.get("patients"), dict):
        notes.append(
            f"{what}: {path} is of another schema; remove {path.parents[2]}, and the same command makes it again"
        )
        return {}
    patients: dict[str, dict[str, Any]] = found["patients"]
    if not patients:
        notes.append(f"{what}: no patient was judged")
    return patients


Said = dict[tuple[str, int], list[tuple[Any, ...]]]
"""Hospital and seed: our model's answers, one per patient."""
Drawn = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""Hospital: patient: what is known of the reference mask."""


def _with_sizes(traits: Traits, drawn: Drawn, cuts: Sequence[float]) -> Traits:
    """The traits, with the volume of each patient's lesions as one of them."""
    names = [f"under {cuts[0]:g} ml", f"{cuts[0]:g} to {cuts[1]:g} ml", f"{cuts[1]:g} ml and more"]
    found = {site: dict(patients) for site, patients in traits.items()}
    for site, patients in drawn.items():
        for patient, values in patients.items():
            if (ml := values.get("reference_ml")) is not None:
                size = names[bisect_right(cuts, ml)] if ml else "none"
                own = found.setdefault(site, {})
                own[patient] = {**own.get(patient, {}), "lesion volume": size}
    return found


def _empty_notes(plan: Plan, drawn: Drawn) -> list[str]:
    """Hospitals at which the reference lacks a label, or all of them: scores there follow the rule of empty masks."""
    labels, notes = plan.study.task.labels, list[str]()
    for site, patients in drawn.items() if plan.study.task.kind == "segmentation" else ():
        lacks = {label: sum(_ABSENT + label in values for values in patients.values()) for label in labels}
        empty = sum(all(_ABSENT + label in values for label in labels) for values in patients.values())
        rule = "such a patient counts by the rule of empty masks: Dice 1 where nothing is predicted, else 0"
        if empty:
            notes.append(f"{site}: the reference mask is empty for {cell(empty)} of {len(patients)} patients; {rule}")
        for label in labels:
            if len(labels) > 1 and lacks[label] == len(patients) > empty:
                notes.append(f"{site}: no reference mask has the label {label}; its scores there say little, as {rule}")
    return notes


def _class_notes(plan: Plan, drawn: Drawn) -> list[str]:
    """Hospitals without a patient of some class: AUROC and accuracy there are of the other classes."""
    labels, notes = plan.study.task.labels, list[str]()
    for site, patients in drawn.items():
        seen = {int(values["class"]) for values in patients.values() if "class" in values}
        lacks = [label for number, label in enumerate(labels) if number not in seen]
        if seen and lacks:
            notes.append(f"{site}: no patient is of class {', '.join(lacks)}; its scores there are of the others")
    return notes


def _add_answer(said: Said, seed: int, model: str, site: str, values: Mapping[str, Any]) -> None:
    """What our model said of a patient, where it is not a mask."""
    answer = tuple(v for name, v in values.items() if name == "predicted" or name.startswith("probability_"))
    if answer and model == OURS:
        said.setdefault((site, seed), []).append(answer)


def _alike_notes(said: Said) -> list[str]:
    """Hospitals at which our model says the same of every patient."""
    alike = dict.fromkeys(site for (site, _), answers in said.items() if len(answers) > 1 and len(set(answers)) == 1)
    return [f"{TITLES[OURS]} at {site}: the same prediction for every patient; it ranks nobody" for site in alike]


def _add(scores: Scores, seed: int, model: str, site: str, patient: str, values: Mapping[str, float | None]) -> None:
    for metric, value in values.items():
        if metric not in _NO_METRIC and not metric.startswith(_NO_METRICS):
            table = scores.setdefault(metric, {}).setdefault(f"{seed:010d}", {}).setdefault(model, {})
            table.setdefault(site, {}).setdefault(patient, []).append(value)


def _add_record(records: Records, seed: int, model: str, site: str, patient: str, values: Mapping[str, Any]) -> None:
    """What AUROC or concordance need of a patient, where the values have it."""
    record: tuple[Any, ...]
    if "class" in values:
        names = sorted((name for name in values if name.startswith("probability_")), key=lambda n: int(n[12:]))
        metric, record = "auroc", (int(values["class"]), [_float(values[name]) for name in names])
    elif "event" in values:
        metric, record = "c_index", (_float(values["predicted"]), _float(values["observed"]), bool(values["event"]))
    else:
        return
    table = records.setdefault(metric, {}).setdefault(f"{seed:010d}", {}).setdefault(model, {})
    table.setdefault(site, {}).setdefault(patient, []).append(record)


def _float(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _averaged_records(
    tables: Mapping[str, Mapping[str, Mapping[str, list[Any]]]],
) -> dict[str, dict[str, dict[str, Any]]]:
    """A patient's record over folds: predictions are averaged, what is known of the patient is the same in all."""

    def merged(found: list[Any]) -> Any:
        if len(found) == 1:
            return found[0]
        if isinstance(found[0][1], list):
            return found[0][0], np.mean([probabilities for _, probabilities in found], axis=0).tolist()
        return float(np.mean([predicted for predicted, _, _ in found])), *found[0][1:]

    return {
        model: {
            site: {patient: merged(found) for patient, found in patients.items()} for site, patients in sites.items()
        }
        for model, sites in tables.items()
    }


def _averaged(
    tables: Mapping[str, Mapping[str, Mapping[str, list[float | None]]]],
) -> dict[str, dict[str, dict[str, float | None]]]:
    """A patient's value over folds: their mean; None if one of them is not finite."""
    return {
        model: {
            site: {patient: _mean(values) for patient, values in patients.items()} for site, patients in sites.items()
        }
        for model, sites in tables.items()
    }


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def _hospitals(plan: Plan) -> list[str]:
    names = [name for fold in plan.folds for name in [*fold.train, *fold.hospital.values()]]
    return sorted(dict.fromkeys(names))

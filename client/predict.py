# SPDX-License-Identifier: Apache-2.0
"""``fedneuro-node predict``: a released, verified model on the hospital's own scans. Nothing leaves the machine.

    1. the pack is checked in full (:func:`fedneuro.privacy.release_pack.open_released`); the weights are those signed
    2. every scan must have the modalities of the study; what is missing is told at once, before anything is computed
    3. each scan is prepared and judged by the code that judged the model in the study, without cache
    4. predictions are written on each scan's own grid, as a BIDS derivative, readable by their owner alone

With ``compare`` a scan that has a mask of the hospital's own readers is scored against it, which is what a hospital
should do before it trusts a model from elsewhere.
"""

import csv
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..models.metrics import dice
from ..models.spec import OUTCOMES
from ..privacy.errors import DataError, EnvironmentProblem
from ..privacy.folders import require_empty
from ..privacy.release_pack import Released, open_released
from ..privacy.study import Study
from .data import checks
from .data.bids import ScanFiles, find_patients, find_scans
from .data.nifti import read_volume
from .data.preprocess import Prepared, prepare
from .inference import class_probabilities, label_map, predicted_outcome
from .original_grid import on_scan_grid, save_labels

__all__ = ["NOTICE", "Prediction", "predict", "predict_bundle"]

NOTICE = "Not a medical device; not for diagnosis. Predictions stay on this machine."


@dataclass(frozen=True, slots=True)
class Prediction:
    """One scan. ``values``: ml or probability by label, or the outcome; ``dice``: against the hospital's own mask."""

    scan: str
    file: str
    values: dict[str, float]
    dice: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Model:
    study: Study
    network: nn.Module
    device: torch.device


def predict(
    released: Released,
    data: Path,
    out: Path,
    *,
    compare: bool = False,
    device: str = "auto",
    tell: Callable[[str], None] = print,
) -> list[Prediction]:
    """Apply a verified model to every scan of a BIDS folder.

    Args:
        released: as :func:`~fedneuro.privacy.release_pack.open_released` gives it.
        data: BIDS folder; only read. Masks are not needed.
        out: a new or empty folder.
        compare: score against the hospital's own masks, classes or outcomes, where there are some.
        device: ``auto``, ``cpu`` or ``cuda``.
        tell: takes one line per scan.

    Raises:
        StateError: ``out`` holds files.
        DataError: scans lack a modality, or have a fault; nothing is written then.
        EnvironmentProblem: no GPU though one was asked for, or the network is built otherwise by this version.
    """
    require_empty(out)
    study = released.study
    scans = _find(study, data, tell)
    model = _model(released, device)
    out.mkdir(parents=True, exist_ok=True)
    out.chmod(0o700)
    before = os.umask(0o077)
    try:
        rows = []
        for number, files in enumerate(scans, 1):
            row = _one(model, files, out, compare=compare)
            rows.append(row)
            tell(f"{number}/{len(scans)}  {_line(row, study)}")
        _write_table(out / "predictions.tsv", rows, study)
        (out / "dataset_description.json").write_text(_description(released), encoding="utf-8")
    finally:
        os.umask(before)
    return rows


def predict_bundle(bundle: str, data: str, out: str) -> None:
    """What the MONAI bundle of a study calls whose preprocessing MONAI lacks; the bundle must lie in its pack."""
    predict(open_released(Path(bundle).resolve().parents[1]), Path(data), Path(out))
    print(NOTICE)


def _find(study: Study, root: Path, tell: Callable[[str], None]) -> list[ScanFiles]:
    """Step 2."""
    data, task = study.data, study.task
    mask = task.mask if task.kind == "segmentation" else None
    brain = data.preprocessing.mask_name if data.preprocessing.mask == "supplied" else None
    faults, found = checks.Faults(root.name), list[ScanFiles]()
    for patient in find_patients(root):
        try:
            scans = find_scans(root, patient, data.modalities, mask, brain)
        except DataError as error:
            faults.add(error, patient)
            continue
        lacking = checks.missing_modalities(scans, data.modalities)
        if lacking and data.missing_modality != "zero":
            text = f"{patient}: no {' and no '.join(lacking)} image in anat"
            if data.missing_modality == "exclude":
                tell(f"left out: {text}")
                continue
            faults.add(DataError(f"{text}; the model was trained with {', '.join(data.modalities)}, all of them"))
        elif not scans:
            faults.add(DataError(f"{patient}: none of {', '.join(data.modalities)} in anat"))
        found += scans
    faults.raise_if_any()
    if not found:
        raise DataError(f"{root}: no scan has {', '.join(data.modalities)}, which the model was trained with")
    return found


def _model(released: Released, wanted: str) -> _Model:
    study = released.study
    if wanted == "cuda" and not torch.cuda.is_available():
        raise EnvironmentProblem("--device cuda: PyTorch sees no GPU here; use cpu, or see fedneuro-node doctor")
    device = torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")
    return _Model(study, released.network().to(device), device)


def _one(model: _Model, files: ScanFiles, out: Path, *, compare: bool) -> Prediction:
    """Steps 3 and 4 of one scan. Masks play no part in preparing it."""
    prepared = prepare(ScanFiles(files.patient, files.name, files.images, None, files.brain), model.study)
    with torch.inference_mode():
        if model.study.task.kind in OUTCOMES:
            found = predicted_outcome(model, prepared.image)
            return Prediction(files.name, "", {model.study.task.target: found})
        if model.study.task.kind == "classification":
            probabilities = class_probabilities(model, prepared.image)
            named = zip(model.study.task.labels, probabilities.tolist(), strict=True)
            return Prediction(files.name, "", dict(named))
        labels = label_map(model, prepared.image).numpy()
    return _saved(model.study, files, prepared, labels, out, compare=compare)


def _saved(
    study: Study, files: ScanFiles, prepared: Prepared, labels: "np.ndarray[Any, Any]", out: Path, *, compare: bool
) -> Prediction:
    scan = next(path for path in files.images if path is not None)
    volume = read_volume(scan)
    own = on_scan_grid(labels, prepared, volume)
    *entities, suffix = study.task.mask.split("_")
    session = next((part for part in files.name.split("_") if part.startswith("ses-")), "")
    place = Path(
        files.patient, session, "anat", "_".join([files.name, *entities, "desc-predicted", suffix]) + ".nii.gz"
    )
    save_labels(out / place, own, scan)
    voxel = float(np.prod(volume.spacing)) / 1000.0 if volume.spacing else float("nan")
    values = {name: float((own == value).sum()) * voxel for value, name in enumerate(study.task.labels, 1)}
    scores: dict[str, float] = {}
    if compare and files.mask is not None:
        drawn = read_volume(files.mask)
        checks.check_same_grid(drawn, volume)
        scores = dice(own, checks.check_mask(drawn, study.task.labels, empty_allowed=True), study.task.labels)
    return Prediction(files.name, place.as_posix(), values, scores)


def _line(row: Prediction, study: Study) -> str:
    unit = " ml" if study.task.kind == "segmentation" else f" {study.task.unit}".rstrip()
    words = [f"{name} {value:.3g}{unit}" for name, value in row.values.items()]
    words += [f"{name} {value:.3f}" for name, value in row.dice.items()]
    return f"{row.scan}: {', '.join(words)}"


def _write_table(path: Path, rows: Sequence[Prediction], study: Study) -> None:
    """``predictions.tsv``: volumes in ml or probabilities, and Dice where it was compared."""
    unit = "_ml" if study.task.kind == "segmentation" else ""
    scores = list(dict.fromkeys(name for row in rows for name in row.dice))
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, delimiter="\t", lineterminator="\n")
        table.writerow(["scan", "file", *(f"{name}{unit}" for name in study.task.outputs), *scores])
        for row in rows:
            values = [f"{row.values[name]:.6g}" for name in study.task.outputs]
            table.writerow([row.scan, row.file or "n/a", *values, *(_number(row.dice.get(name)) for name in scores)])


def _number(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.6g}"


def _description(released: Released) -> str:
    """``dataset_description.json`` of a BIDS derivative: which model this is, and that it was verified."""
    model = released.manifest.model
    values = {
        "Name": f"Predictions of {released.study.study.name}",
        "BIDSVersion": "1.10.0",
        "DatasetType": "derivative",
        "GeneratedBy": [
            {
                "Name": "FedNeuro",
                "Version": version("fedneuro"),
                "Description": NOTICE,
                "StudyHash": released.manifest.study.hash,
                "ModelDigest": model.digest if model else "",
                "Signed": released.signed,
            }
        ],
    }
    return json.dumps(values, indent=2, ensure_ascii=False) + "\n"

# SPDX-License-Identifier: Apache-2.0
"""Judging a model at a site: per patient, over whole volumes, with intervals over patients.

A training site judges on its validation patients, a held-out site on all of its patients. What leaves is a
mean, a 95 % interval and the public number of patients per metric (and per label), as :mod:`.metric_release` allows;
the values of single patients, and the pictures, stay in the site's folder.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from ..models.metrics import accuracy, auroc, bootstrap, bootstrap_interval, dice, hausdorff95
from ..privacy.contract import Arrays, Estimate, EvaluateReply
from .data import Scan
from .inference import class_probabilities, label_map
from .metric_release import release
from .session import Session

__all__ = ["evaluate"]


def evaluate(session: Session, number: int, arrays: Arrays, *, final: bool) -> EvaluateReply:
    """Judge the global ``arrays`` of round ``number``.

    Args:
        session: the study at this site.
        number: round of the model; 0 is the untrained one.
        arrays: its weights.
        final: also compute the costly metrics (HD95) and write the local pictures.
    """
    started = time.monotonic()
    session.load(arrays)
    session.network.eval()
    with torch.inference_mode():
        if session.study.task.kind == "segmentation":
            metrics = _segmentation(session, final=final)
        else:
            metrics = _classification(session, final=final)
    metrics = release(session, number, arrays, metrics, final=final)
    return EvaluateReply(site=session.settings.name, round=number, metrics=metrics, seconds=time.monotonic() - started)


def _segmentation(session: Session, *, final: bool) -> dict[str, Estimate]:
    """Mean over patients; a patient with several scans counts once, with the mean of the scans."""
    study, values = session.study, dict[str, list[float]]()
    labels = study.task.labels
    pictures = _Pictures(session) if final else None
    for patient in session.evaluated:
        scores: dict[str, list[float]] = {}
        for scan in session.data.scans(patient):
            prediction, truth = label_map(session, scan.image).numpy(), scan.label.numpy()
            found = dice(prediction, truth, labels) if "dice" in study.metric_names else {}
            if final and "hd95" in study.metric_names and scan.spacing is not None:
                found |= hausdorff95(prediction, truth, labels, scan.spacing)
            for name, value in found.items():
                scores.setdefault(name, []).append(value)
            if pictures:
                pictures.segmentation(patient, scan, prediction, found)
        for name, per_scan in scores.items():
            values.setdefault(name, []).append(float(np.mean(per_scan)))
    if pictures:
        pictures.close()
    return {name: _mean_estimate(session, np.array(per_patient)) for name, per_patient in values.items()}


def _mean_estimate(session: Session, values: NDArray[np.float64]) -> Estimate:
    mean, low, high = bootstrap_interval(
        values, resamples=session.study.evaluation.bootstrap, seed=session.study.study.seed
    )
    return Estimate(mean=mean, low=low, high=high, n=len(values))


def _classification(session: Session, *, final: bool) -> dict[str, Estimate]:
    """Cohort metrics over patients; a patient's probabilities are the mean over slices and scans."""
    study = session.study
    if not session.evaluated:
        return {}
    probabilities, targets = [], []
    pictures = _Pictures(session) if final else None
    for patient in session.evaluated:
        scans = session.data.scans(patient)
        per_scan = [class_probabilities(session, scan.image) for scan in scans]
        probability = np.mean(per_scan, axis=0)
        probabilities.append(probability)
        targets.append(int(scans[0].label))
        if pictures:
            pictures.classification(patient, scans[0], probability)
    if pictures:
        pictures.close()
    p, t = np.array(probabilities), np.array(targets)
    statistics: dict[str, Callable[[NDArray[np.intp]], float | None]] = {
        "accuracy": lambda rows: accuracy(p[rows], t[rows]),
        "auroc": lambda rows: auroc(p[rows], t[rows]),
    }
    found = {}
    for name in study.metric_names:
        interval = bootstrap(statistics[name], len(t), resamples=study.evaluation.bootstrap, seed=study.study.seed)
        if interval is not None:
            found[name] = Estimate(mean=interval[0], low=interval[1], high=interval[2], n=len(t))
    return found


class _Pictures:
    """Local pictures of the first patients, for the site's own eyes and for simulations."""

    def __init__(self, session: Session) -> None:
        self._folder = session.settings.state / "previews"
        self._left = session.study.evaluation.previews
        self._labels = session.study.task.labels
        self._entries: list[dict[str, object]] = []
        self._folder.mkdir(parents=True, exist_ok=True)
        for old in self._folder.iterdir():
            old.unlink()

    def segmentation(self, patient: str, scan: Scan, prediction: NDArray[np.int64], scores: dict[str, float]) -> None:
        if not self._take():
            return
        from .previews import render_preview

        caption = f"Dice {scores['dice']:.2f}" if "dice" in scores else ""
        path = self._add(patient, caption)
        render_preview(path, scan.image[0].numpy(), scan.label.numpy(), prediction, title=patient)

    def classification(self, patient: str, scan: Scan, probability: NDArray[np.float64]) -> None:
        if not self._take():
            return
        from .previews import render_classification

        truth, guess = self._labels[int(scan.label)], self._labels[int(probability.argmax())]
        path = self._add(patient, f"{truth}; predicted {guess}")
        render_classification(path, scan.image[0].numpy(), truth, guess, float(probability.max()))

    def close(self) -> None:
        (self._folder / "index.json").write_text(json.dumps(self._entries), encoding="utf-8")

    def _take(self) -> bool:
        self._left -= 1
        return self._left >= 0

    def _add(self, patient: str, caption: str) -> Path:
        name = f"{len(self._entries) + 1}.png"
        self._entries.append({"file": name, "caption": f"{patient}: {caption}"})
        return self._folder / name

# SPDX-License-Identifier: Apache-2.0
"""Local pictures of the first patients that are judged, for the site's own eyes and for simulations."""

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..models.spec import OUTCOMES, TaskSection
from .data import Scan
from .data.outcomes import Outcome
from .session import Session

__all__ = ["Pictures", "outcome_words"]


def outcome_words(task: TaskSection, predicted: float, outcome: Outcome) -> str:
    """What became of a patient, and what was predicted.

    Example:
        >>> task = TaskSection(kind="survival", target="os", event="died", time_cuts=(12.0,), unit="months")
        >>> outcome_words(task, 7.25, Outcome(9.0))
        'os over 9 months; predicted 7.25 months'
    """
    unit = f" {task.unit}" if task.unit else ""
    known = "" if task.kind == "regression" or outcome.event else " over"
    return f"{task.target}{known} {outcome.value:.4g}{unit}; predicted {predicted:.4g}{unit}"


class Pictures:
    """Writes ``state/previews``: a PNG for each of the first ``evaluation.previews`` scans, and an index."""

    def __init__(self, session: Session) -> None:
        self._folder = session.settings.state / "previews"
        self._left = session.study.evaluation.previews
        self._labels = session.study.task.labels
        self._task = session.study.task
        self._outcomes = session.data.outcomes
        self._entries: list[dict[str, object]] = []
        self._folder.mkdir(parents=True, exist_ok=True)
        for old in self._folder.iterdir():
            old.unlink()

    def see(
        self, patient: str, scan: Scan, found: NDArray[np.int64] | NDArray[np.float64], scores: dict[str, float]
    ) -> None:
        """A scan was judged.

        Args:
            patient: whose it is.
            scan: the scan.
            found: segmentation: predicted label map; classification: probability of each class;
                outcome: what is predicted.
            scores: of a segmentation.
        """
        self._left -= 1
        if self._left < 0:
            return
        if self._task.kind in OUTCOMES:
            self._add_outcome(patient, scan, float(found[0]))
        elif self._task.kind == "segmentation":
            self._add_segmentation(patient, scan, found, scores)
        else:
            self._add_classification(patient, scan, found)

    def close(self) -> None:
        """Write the index."""
        (self._folder / "index.json").write_text(json.dumps(self._entries), encoding="utf-8")

    def _add_segmentation(
        self, patient: str, scan: Scan, prediction: NDArray[np.int64] | NDArray[np.float64], scores: dict[str, float]
    ) -> None:
        from .previews import render_preview

        caption = f"Dice {scores['dice']:.2f}" if "dice" in scores else ""
        path = self._add(patient, caption)
        render_preview(path, scan.image[0].numpy(), scan.label.numpy(), prediction, title=patient)

    def _add_classification(
        self, patient: str, scan: Scan, probability: NDArray[np.int64] | NDArray[np.float64]
    ) -> None:
        from .previews import render_classification

        truth, guess = self._labels[int(scan.label)], self._labels[int(probability.argmax())]
        path = self._add(patient, f"{truth}; predicted {guess}")
        render_classification(path, scan.image[0].numpy(), truth, guess, float(probability.max()))

    def _add_outcome(self, patient: str, scan: Scan, predicted: float) -> None:
        from .previews import render_maps

        words = outcome_words(self._task, predicted, self._outcomes[patient])
        image = scan.image[0].numpy()
        render_maps(self._add(patient, words), image[..., image.shape[2] // 2], {}, caption=words)

    def _add(self, patient: str, caption: str) -> Path:
        name = f"{len(self._entries) + 1}.png"
        self._entries.append({"file": name, "caption": f"{patient}: {caption}"})
        return self._folder / name

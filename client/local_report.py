# SPDX-License-Identifier: Apache-2.0
"""The site's own report, ``state/site-report.html``: for the hospital's eyes, written by each final evaluation.

It names patients and shows their scans, so it never leaves: no message of :mod:`fedneuro.privacy.contract` has a place
for it, and the page itself loads nothing and calls nobody. It shows what the consortium's report cannot: true counts,
groups too small to be told, why inference failed, the patients with the worst scores, and what the model looked at.
"""

import base64
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from numpy.typing import NDArray

from ..models.metrics import higher_is_better
from ..models.spec import OUTCOMES, TaskSection
from ..privacy.contract import Estimate
from ..privacy.released import FAILURES, THRESHOLD, split_cells
from .data import Scan
from .evaluation_patients import PatientResult
from .evaluation_pictures import outcome_words
from .explain import attention, grad_cam, sanity, sanity_words, uncertainty
from .inference import Judged, label_map
from .previews import render_classification, render_maps, render_preview
from .session import Session

__all__ = ["FILE", "write_local_report"]

FILE: Final = "site-report.html"
CHECKED: Final = 2
"""Scans for which the sanity check is made; it takes two more maps each."""

Results = Mapping[str, PatientResult]


@dataclass(slots=True, kw_only=True)
class Shown:
    """One patient on the page."""

    patient: str
    score: str
    failure: str
    pictures: list[tuple[str, str]] = field(default_factory=list)
    """Caption, and a PNG in base 64."""


def write_local_report(
    session: Session,
    number: int,
    metrics: Mapping[str, Estimate],
    results: Results,
    cells: Mapping[str, Mapping[str, str]],
) -> Path:
    """Write the report of the model that the session's network holds, in evaluation mode.

    Args:
        session: the study at this site.
        number: round of the model.
        metrics: exact ones, with true counts, cells included.
        results: of every evaluated patient.
        cells: stratum: patient: cell.
    """
    study = session.study
    whole, groups = split_cells(metrics)
    shown, checks = list[Shown](), list[tuple[float, float]]()
    with tempfile.TemporaryDirectory(prefix="fedneuro-") as folder:
        for place, patient in enumerate(_worst(session, results)):
            shown.append(_show(session, patient, results[patient], Path(folder), checks if place < CHECKED else None))
    environment = Environment(
        loader=PackageLoader("fedneuro.client", ""), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    page = environment.get_template("site_report.html").render(
        site=session.settings.name,
        study=study,
        role=session.settings.role.value,
        number=number,
        patients=len(results),
        metrics=[(name, _words(e), e.n) for name, e in whole.items() if name not in (FAILURES, THRESHOLD)],
        threshold=whole[THRESHOLD].mean if THRESHOLD in whole else None,
        groups=[(name, _words(e), e.n) for name, e in groups.items()],
        counts=[(stratum, _counts(of_patient)) for stratum, of_patient in cells.items()],
        failures=[(patient, result.failure) for patient, result in results.items() if result.failure],
        first=study.metric_names[0],
        shown=shown,
        explained=study.evaluation.explain,
        segmentation=study.task.kind == "segmentation",
        outcome=study.task.kind in OUTCOMES,
        sanity=sanity_words(checks),
    )
    path = session.settings.state / FILE
    temporary = path.with_suffix(".tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary.write_text(page, encoding="utf-8")
    temporary.chmod(0o600)
    temporary.replace(path)
    return path


def _worst(session: Session, results: Results) -> list[str]:
    """Patients on whom inference failed, then those with the worst first metric, at most ``evaluation.worst``."""
    name = session.study.metric_names[0]

    def badness(patient: str) -> tuple[bool, float]:
        result = results[patient]
        if result.probability is not None:
            return not result.failure, float(result.probability[result.target])
        if result.outcome is not None:
            return not result.failure, -result.scores["error"]
        value = result.scores.get(name, 0.0)
        return not result.failure, value if higher_is_better.get(name, True) else -value

    return sorted(results, key=badness)[: session.study.evaluation.worst]


def _show(
    session: Session, patient: str, result: PatientResult, folder: Path, checks: list[tuple[float, float]] | None
) -> Shown:
    labels, name = session.study.task.labels, session.study.metric_names[0]
    if result.outcome is not None and result.predicted is not None:
        score = outcome_words(session.study.task, result.predicted, result.outcome)
    elif result.probability is not None:
        score = f"{labels[result.target]}, to which the model gives {result.probability[result.target]:.0%}"
    else:
        score = f"{name} {result.scores[name]:.3f}" if name in result.scores else f"{name} undefined"
    shown = Shown(patient=patient, score=score, failure=result.failure)
    if result.failure:
        return shown
    draw = _segmented if session.study.task.kind == "segmentation" else _classified
    for place, scan in enumerate(session.data.scans(patient)):
        path = folder / f"{len(shown.pictures)}.png"
        caption = draw(session, scan, result, path, checks if place == 0 else None)
        shown.pictures.append((caption, base64.b64encode(path.read_bytes()).decode("ascii")))
    return shown


def _segmented(
    session: Session,
    scan: Scan,
    result: PatientResult,  # noqa: ARG001 - a classification needs it
    path: Path,
    checks: list[tuple[float, float]] | None,
) -> str:
    image, truth = scan.image[0].numpy(), scan.label.numpy()
    with torch.inference_mode():
        prediction = label_map(session, scan.image).numpy()
    maps: dict[str, NDArray[np.float32]] = {}
    caption = scan.name
    if session.study.evaluation.explain:
        either = (truth > 0) | (prediction > 0)
        unsure = _uncertainty(session, scan, np.asarray(either.any((0, 1))))
        maps["uncertainty"] = unsure
        if either.any():
            caption += f": mean uncertainty in the marked region {unsure[either].mean():.2f}"
        if checks is not None:
            depth = int(either.sum((0, 1)).argmax())
            only = np.arange(truth.shape[2]) == depth

            def over_slice(judged: Judged) -> NDArray[np.float32]:
                return _uncertainty(judged, scan, only)[..., depth]

            checks.append(sanity(session, over_slice, image[..., depth]))
    render_preview(path, image, truth, prediction, spacing=scan.spacing, maps=maps)
    return caption


def _uncertainty(judged: Judged, scan: Scan, wanted: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Uncertainty of a scan, 0 in axial slices that are not wanted where the network sees each slice alone."""
    study = judged.study
    if study.model.dims == 3 or study.data.slice_axis != "axial" or not wanted.any():
        return uncertainty(judged, scan.image)
    found = np.zeros(scan.image.shape[1:], np.float32)
    found[..., wanted] = uncertainty(judged, scan.image[..., torch.from_numpy(wanted)])
    return found


def _classified(
    session: Session, scan: Scan, result: PatientResult, path: Path, checks: list[tuple[float, float]] | None
) -> str:
    if not session.study.evaluation.explain:
        if result.probability is None:
            image = scan.image[0].numpy()
            render_maps(path, image[..., image.shape[2] // 2], {})
            return scan.name
        truth, guess = (session.study.task.labels[i] for i in (result.target, int(result.probability.argmax())))
        render_classification(path, scan.image[0].numpy(), truth, guess, float(result.probability.max()))
        return scan.name
    seen = attention(session, scan.image)
    if checks is not None and min(seen.plane.shape) > 1:
        depth = seen.number if seen.view.ndim == 5 else None

        def over_view(judged: Judged) -> NDArray[np.float32]:
            cam = grad_cam(judged, seen.view, seen.label)
            return cam if depth is None else cam[..., depth]

        checks.append(sanity(session, over_view, seen.plane))
    render_maps(path, seen.plane, seen.maps)
    return f"{scan.name}: slice {seen.number + 1}, {_what_speaks(session.study.task, seen.label)}"


def _what_speaks(task: TaskSection, label: int) -> str:
    """What a map of attention speaks for."""
    if task.kind == "regression":
        return f"for a larger {task.target}"
    if task.kind == "survival":
        unit = f" {task.unit}" if task.unit else ""
        return f"for the event between {(0.0, *task.time_cuts)[label]:g} and {task.time_cuts[label]:g}{unit}"
    return f"predicted {task.labels[label]}"


def _words(estimate: Estimate) -> str:
    return f"{estimate.mean:.3f} ({estimate.low:.3f}–{estimate.high:.3f})"


def _counts(of_patient: Mapping[str, str]) -> Sequence[tuple[str, int]]:
    cells = list(of_patient.values())
    return [(cell, cells.count(cell)) for cell in sorted(set(cells))]

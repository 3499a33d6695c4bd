# SPDX-License-Identifier: Apache-2.0
"""From a preprocessed scan to a label map, class probabilities or an outcome, slice by slice or window by window."""

from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F

from ..privacy.study import Study

__all__ = ["Judged", "class_probabilities", "fitted_slices", "label_map", "label_probabilities", "predicted_outcome"]

SLICE_AXES = {"sagittal": 0, "coronal": 1, "axial": 2}
"""Axes of a volume in RAS+ orientation."""

SLICES_AT_ONCE = 16
WINDOWS_AT_ONCE = 2


class Judged(Protocol):
    """What inference needs of a study: its network in evaluation mode, and where that is."""

    @property
    def study(self) -> Study:
        """The study."""
        ...

    @property
    def network(self) -> nn.Module:
        """The network."""
        ...

    @property
    def device(self) -> torch.device:
        """Of the network."""
        ...


def label_map(session: Judged, image: torch.Tensor) -> torch.Tensor:
    """Predicted labels of a scan.

    Args:
        session: the study at this site; its network is in evaluation mode.
        image: preprocessed scan, ``(C, X, Y, Z)``.

    Returns:
        int64 ``(X, Y, Z)`` with values 0 (background) to the number of labels.

    Raises:
        FloatingPointError: the network gave NaN or infinity.
    """
    if session.study.model.dims == 3:
        return _windows(session, image).argmax(0)
    axis = SLICE_AXES[session.study.data.slice_axis]
    slices = image.movedim(axis + 1, 0)  # (S, C, H, W)
    labels = [
        _padded(session, slices[start : start + SLICES_AT_ONCE]).argmax(1)
        for start in range(0, len(slices), SLICES_AT_ONCE)
    ]
    return torch.cat(labels).movedim(0, axis)


def label_probabilities(session: Judged, image: torch.Tensor) -> torch.Tensor:
    """Probability of each label in each voxel of a scan: float32 ``(labels + 1, X, Y, Z)``; as :func:`label_map`."""
    if session.study.model.dims == 3:
        return _windows(session, image).softmax(0)
    axis = SLICE_AXES[session.study.data.slice_axis]
    slices = image.movedim(axis + 1, 0)
    parts = [
        _padded(session, slices[start : start + SLICES_AT_ONCE]).softmax(1)
        for start in range(0, len(slices), SLICES_AT_ONCE)
    ]
    return torch.cat(parts).movedim(0, axis + 1)


def class_probabilities(session: Judged, image: torch.Tensor) -> NDArray[np.float64]:
    """Class probabilities of a scan, ``(classes,)``: the mean over its slices, or of the whole volume.

    Raises:
        FloatingPointError: the network gave NaN or infinity.
    """
    batch = fitted_slices(session.study, image)
    parts = [
        session.network(batch[start : start + SLICES_AT_ONCE].to(session.device)).softmax(1).cpu()
        for start in range(0, len(batch), SLICES_AT_ONCE)
    ]
    return _finite(torch.cat(parts)).double().mean(0).numpy()


def predicted_outcome(session: Judged, image: torch.Tensor) -> float:
    """What is predicted of the patient of a scan, in ``task.unit``: the mean over its slices, or of the whole volume.

    Returns:
        Regression: the number. Survival: the mean time without the event up to the last of ``task.time_cuts``
        (restricted mean survival time, the area under the survival curve, taken as straight within intervals).

    Raises:
        FloatingPointError: the network gave NaN or infinity.
    """
    task, batch = session.study.task, fitted_slices(session.study, image)
    parts = [
        session.network(batch[start : start + SLICES_AT_ONCE].to(session.device)).float().cpu()
        for start in range(0, len(batch), SLICES_AT_ONCE)
    ]
    outputs = _finite(torch.cat(parts)).double()
    if task.kind == "regression":
        return task.centre + task.scale * float(outputs[:, 0].mean())
    alive = F.pad(torch.cumprod(1 - outputs.sigmoid(), 1).mean(0), (1, 0), value=1.0)
    ends = torch.tensor((0.0, *task.time_cuts), dtype=torch.float64)
    return float((ends.diff() * (alive[1:] + alive[:-1]) / 2).sum())


def fitted_slices(study: Study, image: torch.Tensor) -> torch.Tensor:
    """What a classifier sees of a scan: slices ``(S, C, H, W)`` or the volume ``(1, C, X, Y, Z)``, at patch size."""
    batch = image[None] if study.model.dims == 3 else image.movedim(SLICE_AXES[study.data.slice_axis] + 1, 0)
    return _fit(batch, study.data.patch)


def _padded(session: Judged, slices: torch.Tensor) -> torch.Tensor:
    """Logits of ``(S, C, H, W)``; sides are padded with zeros to what the network can halve."""
    height, width = slices.shape[2:]
    stride = session.study.model.stride
    padded = F.pad(slices, (0, -width % stride, 0, -height % stride))
    logits: torch.Tensor = session.network(padded.to(session.device)).float().cpu()
    return _finite(logits[:, :, :height, :width])


def _windows(session: Judged, image: torch.Tensor) -> torch.Tensor:
    """Logits of a volume by overlapping windows with Gaussian weights (MONAI)."""
    from monai.inferers.utils import sliding_window_inference

    logits = sliding_window_inference(
        image[None].to(session.device),
        roi_size=session.study.data.patch,
        sw_batch_size=WINDOWS_AT_ONCE,
        predictor=session.network,
        overlap=session.study.evaluation.overlap,
        mode="gaussian",
    )
    assert isinstance(logits, torch.Tensor)  # noqa: S101 - one output, so MONAI gives one tensor
    return _finite(logits[0].float().cpu())


def _finite(values: torch.Tensor) -> torch.Tensor:
    """``values``, which are numbers; the most probable of NaNs would be a label all the same."""
    if not torch.isfinite(values).all():
        raise FloatingPointError("the network gave a value that is not a finite number")
    return values


def _fit(batch: torch.Tensor, patch: tuple[int, ...]) -> torch.Tensor:
    """Centre-crop and zero-pad the spatial sides of ``(N, C, *spatial)`` to ``patch``."""
    for axis, size in enumerate(patch, start=2):
        have = batch.shape[axis]
        if have > size:
            batch = batch.narrow(axis, (have - size) // 2, size)
    pads: list[int] = []
    for axis in range(len(patch) - 1, -1, -1):
        missing = patch[axis] - batch.shape[axis + 2]
        pads += [missing // 2, missing - missing // 2]
    return F.pad(batch, pads)

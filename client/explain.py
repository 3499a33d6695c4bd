# SPDX-License-Identifier: Apache-2.0
"""What a model looked at and where it is unsure, and whether such a map depends on the model at all.

    uncertainty   segmentation: the entropy of the mean of four predictions, of the scan and of its mirror images
                  (test-time augmentation; Wang et al. 2019, https://doi.org/10.1016/j.neucom.2019.01.103), from 0 to 1
    Grad-CAM      classification: which region speaks for the class that was predicted (Selvaraju et al. 2017,
                  arXiv 1610.02391); regression: for a larger number; survival: for the event in the interval with the
                  largest hazard
    occlusion     the same of slices: how much the probability (number, hazard) falls where a region is hidden (Zeiler &
                  Fergus 2014)
    sanity        the same map of networks that were made forget, first their last layer, then everything (parameter
                  randomisation; Adebayo et al. 2018, arXiv 1810.03292), by rank correlation with the model's own map

MONAI computes Grad-CAM. All of it stays at the site (:mod:`.local_report`).
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ..models.networks import build_network
from ..privacy.study import Study
from .inference import Judged, fitted_slices, label_probabilities

__all__ = ["Attention", "Forgetful", "attention", "grad_cam", "sanity", "sanity_words", "uncertainty"]

Map = NDArray[np.float32]

MIRRORED: Final = ((), (0,), (1,), (0, 1))
"""Axes of the slice (or the first two of a volume) along which a view is mirrored."""
FEWEST_CELLS: Final = 4
"""Grad-CAM is taken at the deepest stage whose map has at least so many cells along each side."""
OCCLUDED_SHARE: Final = 8
"""The hidden region's side is this part of the slice's."""
VIEWS_AT_ONCE: Final = 16
ALIKE: Final = 0.5
"""From this rank correlation on, a map is called alike."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Forgetful:
    """A study with another network than the session's: what :mod:`.inference` needs."""

    study: Study
    network: nn.Module
    device: torch.device


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """What a classifier looked at in one scan.

    Attributes:
        view: the slice that speaks most for the predicted class, ``(1, C, H, W)``, or the volume.
        label: the predicted class; survival: the interval with the largest hazard; regression: 0.
        number: of the slice, from 0; of a volume, the axial slice with the most attention.
        plane: first channel of that slice, ``(H, W)``.
        maps: by name, over the plane, from 0 to 1 of the largest value.
    """

    view: torch.Tensor
    label: int
    number: int
    plane: Map
    maps: dict[str, Map]


def uncertainty(judged: Judged, image: torch.Tensor) -> Map:
    """Entropy of the mean prediction over mirrored views, 0 (sure) to 1 (every label alike), ``(X, Y, Z)``.

    Args:
        judged: its network is in evaluation mode.
        image: preprocessed scan, ``(C, X, Y, Z)``.

    Raises:
        FloatingPointError: the network gave NaN or infinity.
    """
    flat = [axis for axis in range(3) if judged.study.model.dims == 3 or axis != _slice_axis(judged.study)]
    total: torch.Tensor | None = None
    with torch.inference_mode():
        for mirrored in MIRRORED:
            axes = [flat[axis] + 1 for axis in mirrored]
            view = label_probabilities(judged, image.flip(axes) if axes else image)
            view = view.flip(axes) if axes else view
            total = view if total is None else total + view
        assert total is not None  # noqa: S101 - there are views
        mean = total / len(MIRRORED)
        entropy = -(mean * mean.clamp_min(1e-12).log()).sum(0) / math.log(len(mean))
    found: Map = entropy.clamp(0, 1).numpy()
    return found


def attention(judged: Judged, image: torch.Tensor, *, occlude: bool = True) -> Attention:
    """Grad-CAM, and for slices occlusion, of the class that is predicted.

    Args:
        judged: its network is in evaluation mode.
        image: preprocessed scan, ``(C, X, Y, Z)``.
        occlude: also hide regions of a slice, which takes some hundred predictions.
    """
    batch = fitted_slices(judged.study, image).clone().to(judged.device)
    with torch.inference_mode():
        parts = [batch[start : start + VIEWS_AT_ONCE] for start in range(0, len(batch), VIEWS_AT_ONCE)]
        probability = torch.cat([_outputs(judged, part) for part in parts])
    label = int(probability.mean(0).argmax())
    number = int(probability[:, label].argmax())
    view = batch[number : number + 1]
    cam = grad_cam(judged, view, label)
    if judged.study.model.dims == 3:
        number = int(cam.sum((0, 1)).argmax())
        plane = view[0, 0, ..., number].cpu().numpy()
        return Attention(view=view, label=label, number=number, plane=plane, maps={"Grad-CAM": cam[..., number]})
    maps = {"Grad-CAM": cam} | ({"occlusion": _occlusion(judged, view, label)} if occlude else {})
    return Attention(view=view, label=label, number=number, plane=view[0, 0].cpu().numpy(), maps=maps)


def grad_cam(judged: Judged, view: torch.Tensor, label: int) -> Map:
    """Grad-CAM of one class over one slice or volume, as shares of the largest value.

    Args:
        judged: its network is in evaluation mode.
        view: ``(1, C, *spatial)``.
        label: the class.
    """
    from monai.visualize.class_activation_maps import GradCAM

    network = copy.deepcopy(judged.network)  # MONAI leaves its hooks there, and the session's network goes on to train
    with torch.enable_grad():
        camera = GradCAM(network, _stage(judged.study), postprocessing=lambda values: values)
        found = camera(view.clone().requires_grad_(), class_idx=label)
    return _scaled(found[0, 0].detach().cpu().numpy())


def sanity(judged: Judged, draw: Callable[[Judged], Map], plane: NDArray[np.floating]) -> tuple[float, float]:
    """Rank correlation of a map with that of a network that forgot its last layer, and of one that forgot everything.

    Args:
        judged: the model.
        draw: the map of a model over one slice, the same each time.
        plane: the slice; its background (the commonest value of its border) is left out, as every network sees it.

    Returns:
        Each in [-1, 1]; 0 where one of the maps is constant.
    """
    own, study, inside = draw(judged), judged.study, _head(plane)
    fresh = build_network(
        study.model, in_channels=len(study.data.modalities), out_channels=study.task.channels, seed=study.study.seed + 1
    )
    fresh.to(judged.device).eval()
    headless = copy.deepcopy(judged.network)
    last = list(dict(fresh.named_parameters()))[-1].rpartition(".")[0]
    head = {name: value for name, value in fresh.state_dict().items() if name.rpartition(".")[0] == last}
    headless.load_state_dict(head, strict=False)
    found = [
        _rank_correlation(
            own[inside], draw(Forgetful(study=study, network=network.eval(), device=judged.device))[inside]
        )
        for network in (headless, fresh)
    ]
    return found[0], found[1]


def sanity_words(correlations: list[tuple[float, float]]) -> str:
    """What the sanity check found, in a sentence; the mean over scans decides.

    Example:
        >>> sanity_words([(0.4, 0.1)])[:40]
        'The maps depend on what the model learne'
    """
    if not correlations:
        return ""
    head, everything = (float(np.mean([pair[i] for pair in correlations])) for i in (0, 1))
    figures = (
        f"With its last layer forgotten, the rank correlation with the model's own map is {head:.2f}; "
        f"with everything forgotten, {everything:.2f} (1: the same map, 0: unrelated)."
    )
    if abs(everything) < ALIKE:
        return f"The maps depend on what the model learned. {figures}"
    return (
        f"Do not read these maps as what the model learned: a network that learned nothing draws nearly the same ones. "
        f"{figures}"
    )


def _outputs(judged: Judged, batch: torch.Tensor) -> torch.Tensor:
    """What the network says of images: probabilities of classes, hazards of intervals, or the number, ``(N, K)``."""
    logits: torch.Tensor = judged.network(batch)
    kind = judged.study.task.kind
    return logits.sigmoid() if kind == "survival" else logits if kind == "regression" else logits.softmax(1)


def _slice_axis(study: Study) -> int:
    return {"sagittal": 0, "coronal": 1, "axial": 2}[study.data.slice_axis]


def _stage(study: Study) -> str:
    """The deepest stage of the ResNet whose map is not too coarse; the stem shrinks an image four-fold."""
    cells = [min(study.data.patch) // (4 * 2**stage) for stage in range(4)]
    return f"layer{max([stage + 1 for stage, count in enumerate(cells) if count >= FEWEST_CELLS], default=1)}"


def _head(plane: NDArray[np.floating]) -> NDArray[np.bool_]:
    border = np.concatenate([plane[0], plane[-1], plane[:, 0], plane[:, -1]])
    inside: NDArray[np.bool_] = plane != np.median(border)
    return inside if inside.sum() > 1 else np.ones_like(inside)


def _occlusion(judged: Judged, view: torch.Tensor, label: int) -> Map:
    """Mean loss of the class's probability over the hidden squares that cover a pixel; squares overlap by half.

    Written out here: MONAI's (1.6) indexes tensors in a way that torch has announced to change.
    """
    height, width = view.shape[2:]
    side = max(2, min(height, width) // OCCLUDED_SHARE)
    step = max(1, side // 2)
    corners = [(y, x) for y in range(0, height - side + 1, step) for x in range(0, width - side + 1, step)]
    loss, covered = np.zeros((height, width)), np.zeros((height, width))
    fill = view.mean((2, 3), keepdim=True)
    with torch.inference_mode():
        whole = float(_outputs(judged, view)[0, label])
        for start in range(0, len(corners), VIEWS_AT_ONCE):
            some = corners[start : start + VIEWS_AT_ONCE]
            hidden = view.repeat(len(some), 1, 1, 1)
            for row, (y, x) in enumerate(some):
                hidden[row, :, y : y + side, x : x + side] = fill[0]
            for (y, x), left in zip(some, _outputs(judged, hidden)[:, label].tolist(), strict=True):
                loss[y : y + side, x : x + side] += whole - left
                covered[y : y + side, x : x + side] += 1
    return _scaled(loss / np.maximum(covered, 1))


def _scaled(values: NDArray[np.floating]) -> Map:
    """Positive values, as shares of the largest."""
    positive = np.maximum(values, 0)
    scaled: Map = (positive / max(float(positive.max()), 1e-12)).astype(np.float32)
    return scaled


def _rank_correlation(first: Map, second: Map) -> float:
    from scipy.stats import spearmanr

    if np.ptp(first) == 0 or np.ptp(second) == 0:
        return 0.0
    found: Any = spearmanr(first.ravel(), second.ravel())
    return float(found.statistic)

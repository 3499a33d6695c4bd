# SPDX-License-Identifier: Apache-2.0
"""Random changes of one training crop; image and label always move together.

``light`` mirrors, in plain torch (microseconds). ``standard`` adds a small rotation, scaling and shift, gamma and
noise with MONAI's dictionary transforms. ``custom`` takes what the study's ``[data.augmentation]`` says, in the order
mirror, affine, elastic, coarser voxels, bias field, gamma, noise. Each crop is changed from itself alone: nothing mixes
patients, as patient-level privacy needs. Voxels that are exactly 0, background and missing modalities, stay 0 in
intensity changes.
"""

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import torch

from ...privacy.study_data import AugmentationSection

if TYPE_CHECKING:
    from monai.transforms.compose import Compose

__all__ = ["Augment", "augment"]

Augment = Literal["none", "light", "standard", "custom"]

ROTATION = 0.2  # radians, about 11 degrees
SCALING = 0.1
SHIFT = 0.05  # of the patch
GAMMA = (0.7, 1.5)
NOISE = 0.1  # standard deviation at most; images are normalised


def augment(
    image: torch.Tensor,
    label: torch.Tensor | None,
    how: Augment,
    rng: np.random.Generator,
    table: AugmentationSection | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Change one crop.

    Args:
        image: float32 (C, *patch).
        label: int64 (*patch); None for classification.
        how: ``data.augment`` of the study.
        rng: decides everything that is random.
        table: ``[data.augmentation]``, for ``custom``; None: its defaults.

    Returns:
        New tensors of the same shapes, or the same ones where nothing changes.
    """
    if how == "none":
        return image, label
    table = table or AugmentationSection()
    often = table.flip if how == "custom" else 0.5
    axes = [axis for axis, draw in enumerate(rng.random(image.ndim - 1)) if draw < often]
    if axes:
        image = image.flip([axis + 1 for axis in axes])
        label = None if label is None else label.flip(axes)
    if how != "light":
        patch, seed = tuple(image.shape[1:]), int(rng.integers(2**32))
        if how == "custom":
            chain = _custom(patch, label is not None, cast("Hashable", table))  # frozen, which type checkers cannot see
        else:
            chain = _standard(patch, label is not None)
        image, label = _changed(image, label, *chain, seed)
    return image, label


def _changed(
    image: torch.Tensor, label: torch.Tensor | None, move: "_Seeded", shade: "_Seeded", seed: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    sample: dict[str, Any] = {"image": image}
    if label is not None:
        sample["label"] = label[None].to(torch.float32)
    with _plain_tensors():
        moved: Any = move(sample, seed)
        background = moved["image"] == 0
        shaded: Any = shade({"image": moved["image"]}, seed)
    image = shaded["image"].masked_fill(background, 0.0)
    return image, None if label is None else moved["label"][0].round().to(torch.int64)


class _Seeded:
    """A chain that starts from a seed as MONAI's ``set_random_state`` does, without making its generators anew.

    Making one costs 0.13 ms, since NumPy first asks the system for entropy, and a chain has nine; seeding takes 3 µs.
    """

    def __init__(self, chain: "Compose") -> None:
        from monai.transforms.transform import Randomizable

        self._chain = chain.set_random_state(0)  # now every part has a generator of its own
        drawn = [part for part in chain.transforms if isinstance(part, Randomizable)]
        self._generators = [list(_generators(part)) for part in drawn]

    def __call__(self, sample: dict[str, Any], seed: int) -> Any:
        self._chain.R.seed(seed)
        for part in self._generators:
            own = int(self._chain.R.randint(2**32, dtype="uint32"))
            for generator in part:
                generator.seed(own)
        return self._chain(sample)


def _generators(part: Any) -> Iterator[np.random.RandomState]:
    """Those of a transform and of the transforms within it: MONAI gives them all the same seed."""
    from monai.transforms.transform import Randomizable

    yield part.R
    for inner in vars(part).values():
        if isinstance(inner, Randomizable):
            yield from _generators(inner)


@lru_cache(maxsize=8)
def _standard(patch: tuple[int, ...], has_label: bool) -> "tuple[_Seeded, _Seeded]":
    """Spatial and intensity transforms; seeded anew before every use, so sharing them leaks nothing."""
    from monai.transforms.compose import Compose
    from monai.transforms.intensity.dictionary import RandAdjustContrastd, RandGaussianNoised
    from monai.transforms.spatial.dictionary import RandAffined

    keys = ["image", "label"] if has_label else ["image"]
    move = RandAffined(
        keys,
        prob=0.5,
        rotate_range=[ROTATION] * (1 if len(patch) == 2 else 3),
        scale_range=[SCALING] * len(patch),
        translate_range=[SHIFT * side for side in patch],
        mode=["bilinear", "nearest"][: len(keys)],
        padding_mode="zeros",
    )
    shade = [RandAdjustContrastd("image", prob=0.3, gamma=GAMMA), RandGaussianNoised("image", prob=0.3, std=NOISE)]
    return _Seeded(Compose([move])), _Seeded(Compose(shade))


@lru_cache(maxsize=8)
def _custom(patch: tuple[int, ...], has_label: bool, table: AugmentationSection) -> "tuple[_Seeded, _Seeded]":
    """As :func:`_standard`, by the study's table; what has probability 0 is left out."""
    from monai.transforms.compose import Compose
    from monai.transforms.intensity.dictionary import RandAdjustContrastd, RandBiasFieldd, RandGaussianNoised
    from monai.transforms.spatial.dictionary import RandAffined, RandSimulateLowResolutiond

    from .elastic import RandElasticBSplined

    keys = ["image", "label"] if has_label else ["image"]
    modes = ["bilinear", "nearest"][: len(keys)]
    move: list[Any] = []
    if table.affine:
        turn = np.deg2rad(table.rotation)
        move.append(
            RandAffined(
                keys,
                prob=table.affine,
                rotate_range=[turn] * (1 if len(patch) == 2 else 3),
                scale_range=[table.scaling] * len(patch),
                translate_range=[table.shift * side for side in patch],
                mode=modes,
                padding_mode="zeros",
            )
        )
    if table.elastic:
        move.append(RandElasticBSplined(keys, voxels=table.elastic_voxels, modes=modes, prob=table.elastic))
    shade: list[Any] = []
    if table.low_resolution:
        zoom = (table.low_resolution_zoom, 1.0)
        back = "bilinear" if len(patch) == 2 else "trilinear"
        shade.append(
            RandSimulateLowResolutiond("image", prob=table.low_resolution, upsample_mode=back, zoom_range=zoom)
        )
    if table.bias:
        strength = (-table.bias_strength, table.bias_strength)
        shade.append(RandBiasFieldd("image", prob=table.bias, coeff_range=strength))
    if table.gamma:
        low, high = table.gamma_range
        shade.append(RandAdjustContrastd("image", prob=table.gamma, gamma=(low, high)))
    if table.noise:
        shade.append(RandGaussianNoised("image", prob=table.noise, std=table.noise_std))
    return _Seeded(Compose(move)), _Seeded(Compose(shade))


@contextmanager
def _plain_tensors() -> Iterator[None]:
    """Without MONAI's per-tensor metadata, which costs three times the transform itself."""
    from monai.data.meta_obj import get_track_meta, set_track_meta

    before = get_track_meta()
    set_track_meta(False)
    try:
        yield
    finally:
        set_track_meta(before)

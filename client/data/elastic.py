# SPDX-License-Identifier: Apache-2.0
"""Elastic deformation as a MONAI dictionary transform: displacements of a coarse grid, joined by cubic B-splines.

B-spline weights are positive and sum to one, so no voxel moves further than the largest displacement of the grid, and
below 0.4 of the grid's spacing nothing folds over. MONAI's own elastic transform smooths noise over the whole volume,
which costs a hundred times more in three dimensions.

Reference: Rueckert et al., Nonrigid registration using free-form deformations, IEEE Trans Med Imaging 1999;18:712-721;
Choi and Lee, Injectivity conditions of 2D and 3D uniform cubic B-spline functions, Graph Models 2000;62:411-427.
"""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Final

import numpy as np
import torch
from monai.config.type_definitions import KeysCollection
from monai.transforms.transform import MapTransform, RandomizableTransform
from numpy.typing import NDArray
from torch.nn import functional as F

__all__ = ["RandElasticBSplined"]

SPACING: Final = 16
"""Voxels between two points of the coarse grid, about."""
MOST: Final = 0.4
"""Of the spacing: a larger displacement could fold the crop over."""


class RandElasticBSplined(RandomizableTransform, MapTransform):
    """Deforms the crops under some keys alike.

    Args:
        keys: of tensors (C, *patch).
        voxels: largest displacement along an axis.
        modes: ``bilinear`` or ``nearest`` for each key.
        prob: probability.
    """

    def __init__(self, keys: KeysCollection, *, voxels: float, modes: Sequence[str], prob: float) -> None:
        MapTransform.__init__(self, keys)
        RandomizableTransform.__init__(self, prob)
        self.voxels, self.modes = voxels, tuple(modes)

    def __call__(self, data: Mapping[Hashable, torch.Tensor]) -> dict[Hashable, torch.Tensor]:
        """Deform, or not."""
        result = dict(data)
        self.randomize(None)
        if not self._do_transform:
            return result
        patch = tuple(data[self.keys[0]].shape[1:])
        where = self._places(patch)
        for key, mode in zip(self.keys, self.modes, strict=True):
            image = result[key]
            moved = F.grid_sample(
                image[None].to(torch.float32), where, mode=mode, padding_mode="zeros", align_corners=True
            )
            result[key] = moved[0]
        return result

    def _places(self, patch: tuple[int, ...]) -> torch.Tensor:
        """Where each voxel comes from, (1, *patch, dims), in torch's order and units."""
        field: NDArray[np.float64]
        axes = []
        for axis, side in enumerate(patch):
            cells = max(1, round(side / SPACING))
            most = min(self.voxels, MOST * side / cells)
            shape = [max(1, round(n / SPACING)) + 3 for n in patch]
            field = self.R.uniform(-most, most, shape)
            for direction, n in enumerate(patch):
                field = np.moveaxis(np.tensordot(_weights(n), field, (1, direction)), 0, direction)
            place = np.arange(side).reshape([-1 if a == axis else 1 for a in range(len(patch))]) + field
            axes.append(2 * place / max(side - 1, 1) - 1)
        return torch.from_numpy(np.stack(axes[::-1], axis=-1).astype(np.float32))[None]


def _weights(side: int) -> NDArray[np.float64]:
    """Cubic B-spline weights of the coarse points for each voxel of an axis, (side, cells + 3)."""
    cells = max(1, round(side / SPACING))
    at = np.arange(side) * (cells / side)
    first = np.minimum(at.astype(int), cells - 1)
    t = at - first
    four: list[Any] = [(1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3]
    weights = np.zeros((side, cells + 3))
    for offset, values in enumerate(four):
        weights[np.arange(side), first + offset] = values / 6
    return weights

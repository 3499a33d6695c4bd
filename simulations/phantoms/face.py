# SPDX-License-Identifier: Apache-2.0
"""Face, neck and fat around a phantom's brain: bright things that are no lesion.

The template ends with the brain. A network that has never seen the fat of an orbit or a cheek takes it for a lesion,
which is how the first models that were pre-trained on phantoms failed. Places are rough means of adults, in mm
from the middle of the field of view; sizes, shapes and what is fat, muscle or air inside are drawn at random.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .anatomy import Anatomy, Volume, smooth_field

__all__ = ["add_face"]


def add_face(generator: np.random.Generator, anatomy: Anatomy) -> tuple[NDArray[np.float32], Volume]:
    """Tissues with a face, and fat as a tissue of its own.

    Returns:
        Fractions as :attr:`.Anatomy.tissue`, shape (6, X, Y, Z), and of fat, shape (X, Y, Z); their sum is ≤ 1.
    """
    tissue, grid = anatomy.tissue.copy(), anatomy.grid
    jitter = generator.normal(0, 4, 3)
    size = float(generator.normal(1.0, 0.06))
    rough = smooth_field(generator, grid, 22.0)[0]

    face = _ellipsoid(anatomy, (0, 52, -62), (64, 56, 58), jitter, size) + 4 * rough
    neck = np.minimum(_ellipsoid(anatomy, (0, -15, -90), (58, 70, 60), jitter, size), _below(anatomy, -38)) + 3 * rough
    inside = np.maximum(face, neck)
    free = np.clip(1 - tissue.sum(0), 0, 1)
    tissue[5] += free * np.clip(inside / 2 + 0.5, 0, 1)

    shell = np.clip((generator.uniform(3, 14) + 4 * rough - inside) / 2 + 0.5, 0, 1) * (inside > -1)
    lumps = np.clip((smooth_field(generator, grid, 13.0)[0] - generator.uniform(0.3, 1.2)) / 0.3 + 0.5, 0, 1)
    fatty = np.maximum(shell, lumps)
    eyes = np.zeros(grid.shape, np.float32)
    for side in (-1, 1):
        orbit = _ellipsoid(anatomy, (side * 28, 62, -52), (18, 28, 16), jitter, size)
        globe = _ellipsoid(anatomy, (side * 33, 76, -53), (13, 13, 13), jitter, size)
        fatty = np.maximum(fatty, np.clip(orbit / 2 + 0.5, 0, 1))
        eyes = np.maximum(eyes, np.clip(globe / 2 + 0.5, 0, 1))
    fatty *= 1 - eyes
    # What is fat was muscle or bone before; brain and its fluid stay.
    fat = fatty * tissue[5] + 0.6 * fatty * tissue[3] * (inside > 0)
    tissue[3] -= 0.6 * fatty * tissue[3] * (inside > 0)
    tissue[5] -= fatty * tissue[5]
    holes = np.clip((smooth_field(generator, grid, 16.0)[0] - generator.uniform(0.6, 1.6)) / 0.3 + 0.5, 0, 1)
    tissue[5] *= 1 - holes
    return tissue, np.asarray(fat, np.float32)


def _ellipsoid(
    anatomy: Anatomy, centre: Sequence[float], radii: Sequence[float], jitter: NDArray[np.float64], size: float
) -> Volume:
    """Depth in mm inside an ellipsoid, roughly; negative outside."""
    axes = anatomy.grid.axes_mm()
    square = sum(
        ((axis - np.float32(at + move)) / np.float32(radius * size)) ** 2
        for axis, at, move, radius in zip(axes, centre, jitter, radii, strict=True)
    )
    return np.asarray((1 - np.sqrt(square)) * np.float32(min(radii) * size), np.float32)


def _below(anatomy: Anatomy, height_mm: float) -> Volume:
    """Depth in mm below a height over the middle of the field of view."""
    return np.asarray(np.float32(height_mm) - anatomy.grid.axes_mm()[2], np.float32)

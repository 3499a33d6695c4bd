# SPDX-License-Identifier: Apache-2.0
"""Lesions, and tissue fractions turned into the grey values that a scanner would give.

A lesion grows from a point in the white matter of the hemispheres as a distorted ellipsoid; grey matter slows
it and fluid stops it. What it replaces is known per voxel as a fraction, so edges have partial volume, and
the truth is where the fraction exceeds one half. A scan is a mixture of grey levels, times texture and bias
field, blurred, with Rician noise: the magnitude of a complex signal with normal noise in both channels
(Gudbjartsson and Patz, Magn Reson Med 34 (1995) 910). Outside the head values are exactly 0.
"""

from typing import Final

import numpy as np
from numpy.typing import NDArray

from .anatomy import TISSUES, Anatomy, Volume, smooth_field
from .lesions import draw_kind
from .style import SiteStyle

__all__ = ["draw_lesions", "scan"]

RADIUS_MM: Final = (6.0, 20.0)
"""Least and greatest radius of a lesion before it is distorted."""

LEAST_ML: Final = 1.5
"""A patient's lesions are grown until they hold this volume, so that everyone has something to find."""


def draw_lesions(generator: np.random.Generator, anatomy: Anatomy, style: SiteStyle) -> Volume:
    """Fraction of each voxel that is lesion, shape (X, Y, Z), 0 to 1; at least one lesion.

    Args:
        generator: the patient's generator.
        anatomy: the head.
        style: number, size and kind of lesions.
    """
    if style.lesion_kind != "blob":
        voxels = LEAST_ML * 1000 / float(np.prod(anatomy.grid.voxel_mm))
        while np.count_nonzero((found := draw_kind(style.lesion_kind, generator, anatomy)[0]) > 0.5) < voxels:
            pass  # most of it fell outside the brain
        return found
    wm = anatomy.fraction("wm")
    candidates = np.argwhere((wm > 0.75) & (anatomy.height_mm > -20))
    resistance = 0.35 * anatomy.fraction("gm") + 3.0 * anatomy.fraction("csf")
    resistance += 3.0 * (1 - anatomy.tissue[:3].sum(0)) + 0.3 * smooth_field(generator, anatomy.grid, 9.0)[0]
    count = 1 + int(min(generator.poisson(style.lesions - 1), 5))
    places = candidates[generator.integers(len(candidates), size=count)]
    radii = np.clip(style.lesion_radius_mm * np.exp(generator.normal(0, 0.35, count)), *RADIUS_MM)
    shapes = np.exp(generator.normal(0, 0.2, (count, 3)))
    voxel_ml = float(np.prod(anatomy.grid.voxel_mm)) / 1000
    while True:
        fraction = np.zeros(anatomy.grid.shape, np.float32)
        for place, radius, shape in zip(places, radii, shapes, strict=True):
            np.maximum(fraction, _lesion(anatomy, resistance, place, radius, shape), out=fraction)
        if np.count_nonzero(fraction > 0.5) * voxel_ml >= LEAST_ML:
            return fraction
        radii = radii * 1.25


def scan(
    generator: np.random.Generator, anatomy: Anatomy, lesions: Volume, style: SiteStyle, modality: str
) -> NDArray[np.float32] | NDArray[np.int16]:
    """One scan of a head.

    Args:
        generator: the scan's generator.
        anatomy: the head.
        lesions: fraction per voxel, shape (X, Y, Z).
        style: the scanner.
        modality: one of :data:`~.style.MODALITIES`.

    Returns:
        Stored values, shape (X, Y, Z), axes right, anterior, superior; 0 outside the head, positive inside.
    """
    from scipy.ndimage import gaussian_filter

    grid, levels = anatomy.grid, style.levels[modality]
    signal = np.einsum("t,txyz->xyz", np.array([levels[name] for name in TISSUES], np.float32), anatomy.tissue)
    # Lesions differ a little from patient to patient, and inside.
    wm, contrast = levels["wm"], style.lesion_contrast * generator.normal(1.0, 0.06)
    inside = wm + contrast * (levels["lesion"] - wm) * (1 + 0.12 * smooth_field(generator, grid, 10.0)[0])
    signal += lesions * (inside - signal)
    signal *= 1 + 0.03 * smooth_field(generator, grid, 8.0)[0]
    signal *= np.exp(style.bias * smooth_field(generator, grid, 110.0)[0])
    width = np.array([style.blur_mm, style.blur_mm, max(style.blur_mm, 0.8 * grid.voxel_mm[2])])
    signal = gaussian_filter(signal, width / 2.355 / np.array(grid.voxel_mm), mode="nearest", truncate=3.0)
    noise = style.noise * generator.standard_normal((2, *grid.shape), dtype=np.float32)
    signal = np.hypot(signal + noise[0], noise[1]) * np.float32(style.intensity * generator.uniform(0.85, 1.15))
    head = anatomy.tissue.sum(0) > 0.5
    if style.float_storage:
        return np.where(head, np.maximum(signal, np.float32(1e-3)), np.float32(0)).astype(np.float32)
    return np.where(head, np.clip(np.rint(signal), 1, 32767), 0).astype(np.int16)


def _lesion(
    anatomy: Anatomy, resistance: Volume, place: NDArray[np.int64], radius: float, shape: NDArray[np.float64]
) -> Volume:
    """Fraction of one lesion: an ellipsoid about ``place`` whose edge moves with the tissue's resistance."""
    axes = [
        (np.arange(n) - at) * size for n, at, size in zip(anatomy.grid.shape, place, anatomy.grid.voxel_mm, strict=True)
    ]
    x, y, z = (axis / (radius * factor) for axis, factor in zip(axes, shape, strict=True))
    distance = np.sqrt((x**2)[:, None, None] + (y**2)[None, :, None] + (z**2)[None, None, :]).astype(np.float32)
    depth_mm = (1 - distance - resistance) * np.float32(radius)
    return np.asarray(np.clip(depth_mm / 4.0 + 0.5, 0, 1), np.float32)

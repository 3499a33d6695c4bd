# SPDX-License-Identifier: Apache-2.0
"""Lesions of several kinds, for pre-training: what is learned should not be one disease's outline.

- ``blob``: one to three rounded lesions, as in the phantom hospitals (:mod:`.scan`);
- ``mass``: glioma-like, a large irregular oedema that follows white matter, with a core (cyst, rim or solid);
- ``multifocal``: many small lesions, most beside the ventricles, as in multiple sclerosis;
- ``wedge``: infarct-like, a wedge from deep white matter through cortex.

Each is a fraction per voxel, so edges have partial volume. Their shapes are drawn from general knowledge of these
diseases; no patient was looked at.
"""

from collections.abc import Callable, Mapping
from typing import Final

import numpy as np
from numpy.typing import NDArray

from .anatomy import Anatomy, Volume, smooth_field

__all__ = ["LESION_KINDS", "draw_kind"]

EDGE_MM: Final = 3.0
"""Width over which a lesion's fraction falls from 1 to 0."""

Lesion = tuple[Volume, Volume]
"""Fraction of each voxel that is lesion, and the part of it that is core, both (X, Y, Z), core ≤ lesion."""


def draw_kind(kind: str, generator: np.random.Generator, anatomy: Anatomy) -> Lesion:
    """Lesions of one kind in a head.

    Args:
        kind: one of :data:`LESION_KINDS`.
        generator: decides place, size and shape.
        anatomy: the head.
    """
    return LESION_KINDS[kind](generator, anatomy)


def _blob(generator: np.random.Generator, anatomy: Anatomy) -> Lesion:
    count = int(generator.integers(1, 4))
    return _union(generator, anatomy, _places(generator, anatomy, count), generator.uniform(6.0, 24.0, count), 0.2)


def _multifocal(generator: np.random.Generator, anatomy: Anatomy) -> Lesion:
    count = int(generator.integers(4, 20))
    radii = np.clip(np.exp(generator.normal(np.log(4.0), 0.4, count)), 2.0, 10.0)
    return _union(generator, anatomy, _places(generator, anatomy, count, near_ventricles=0.6), radii, 0.3)


def _union(
    generator: np.random.Generator,
    anatomy: Anatomy,
    places: NDArray[np.int64],
    radii: NDArray[np.float64],
    roughness: float,
) -> Lesion:
    rough = roughness * smooth_field(generator, anatomy.grid, 9.0)[0] - _resistance(anatomy, 0.35, 2.5)
    fraction = np.zeros(anatomy.grid.shape, np.float32)
    for place, radius in zip(places, radii, strict=True):
        depth = 1 - _distance(generator, anatomy, place, float(radius)) + rough
        np.maximum(fraction, _edge(depth, float(radius)), out=fraction)
    return fraction, np.zeros_like(fraction)


def _mass(generator: np.random.Generator, anatomy: Anatomy) -> Lesion:
    place, radius = _places(generator, anatomy, 1)[0], float(generator.uniform(13.0, 42.0))
    coarse, fine = smooth_field(generator, anatomy.grid, 18.0)[0], smooth_field(generator, anatomy.grid, 7.0)[0]
    distance = _distance(generator, anatomy, place, radius)
    fingers = generator.uniform(0.1, 0.35) * coarse + generator.uniform(0.05, 0.25) * fine
    # A mass may push a ventricle aside, which looks as if it had taken its place.
    resistance = _resistance(anatomy, float(generator.uniform(0.0, 0.2)), float(generator.uniform(0.1, 0.9)))
    fraction = _edge(1 - distance + fingers - resistance, radius)
    share = generator.uniform(0.25, 0.85)
    core = _edge(share - distance + 0.12 * coarse + 0.08 * fine, radius) * fraction
    if generator.random() < 0.35:  # a rim: the core is a shell
        core *= 1 - _edge(share - 0.2 - distance + 0.1 * coarse, radius)
    if generator.random() < 0.25:
        core[:] = 0
    return fraction, core


def _wedge(generator: np.random.Generator, anatomy: Anatomy) -> Lesion:
    apex = _places(generator, anatomy, 1)[0]
    axes = _offsets(anatomy, apex)
    centre = np.array([(n - 1) / 2 * s for n, s in zip(anatomy.grid.shape, anatomy.grid.voxel_mm, strict=True)])
    outward = apex * np.array(anatomy.grid.voxel_mm) - centre + generator.normal(0, 10, 3)
    outward /= np.linalg.norm(outward) + 1e-6
    along = sum(a * np.float32(o) for a, o in zip(axes, outward, strict=True))
    length = np.sqrt(sum(a**2 for a in axes)) + np.float32(1e-3)
    spread = np.float32(np.cos(generator.uniform(0.45, 0.95)))
    rough = 0.12 * smooth_field(generator, anatomy.grid, 12.0)[0]
    depth = along / length - spread + rough - _resistance(anatomy, 0.0, 0.5)
    reach = float(generator.uniform(25.0, 70.0))
    fraction = _edge(depth, 25.0) * np.clip((reach - length) / 6.0 + 0.5, 0, 1)
    found = np.asarray(fraction, np.float32)
    return found, np.zeros_like(found)


LESION_KINDS: Final[Mapping[str, Callable[[np.random.Generator, Anatomy], Lesion]]] = {
    "blob": _blob,
    "mass": _mass,
    "multifocal": _multifocal,
    "wedge": _wedge,
}
"""How each kind is drawn."""


def _places(
    generator: np.random.Generator, anatomy: Anatomy, count: int, *, near_ventricles: float = 0.0
) -> NDArray[np.int64]:
    """Voxels of white matter of the hemispheres, shape (count, 3); a share of them beside deep fluid."""
    white = (anatomy.fraction("wm") > 0.6) & (anatomy.height_mm > -25)
    candidates = np.argwhere(white)
    chosen = candidates[generator.integers(len(candidates), size=count)]
    middle = (np.array(anatomy.grid.shape) - 1) / 2
    extent = np.array(anatomy.grid.shape) / 2
    deep = np.abs((candidates - middle) / extent).max(1) < 0.4
    if near_ventricles and deep.any():
        close = candidates[deep]
        beside = generator.random(count) < near_ventricles
        chosen[beside] = close[generator.integers(len(close), size=count)][beside]
    return np.asarray(chosen, np.int64)


def _resistance(anatomy: Anatomy, grey: float, fluid: float) -> Volume:
    """How much tissue holds a lesion back: grey matter a little, fluid more, everything outside the brain wholly."""
    outside = 4.0 * (1 - anatomy.tissue[:3].sum(0))
    return np.asarray(grey * anatomy.fraction("gm") + fluid * anatomy.fraction("csf") + outside, np.float32)


def _offsets(anatomy: Anatomy, place: NDArray[np.int64]) -> list[Volume]:
    """Distance in mm of each voxel from ``place``, along each axis, shaped to broadcast."""
    x, y, z = (
        ((np.arange(n) - at) * size).astype(np.float32)
        for n, at, size in zip(anatomy.grid.shape, place, anatomy.grid.voxel_mm, strict=True)
    )
    return [x[:, None, None], y[None, :, None], z[None, None, :]]


def _distance(generator: np.random.Generator, anatomy: Anatomy, place: NDArray[np.int64], radius: float) -> Volume:
    """Distance from ``place`` in units of a random ellipsoid's radii."""
    factors = radius * np.exp(generator.normal(0, 0.25, 3))
    axes = _offsets(anatomy, place)
    return np.asarray(np.sqrt(sum((a / np.float32(f)) ** 2 for a, f in zip(axes, factors, strict=True))), np.float32)


def _edge(depth: Volume, radius: float) -> Volume:
    """From depth inside a surface, in units of ``radius`` mm, to a fraction."""
    return np.asarray(np.clip(depth * np.float32(radius / EDGE_MM) + 0.5, 0, 1), np.float32)

# SPDX-License-Identifier: Apache-2.0
"""A head that nobody has: the ICBM152 tissue maps, deformed at random, as tissue fractions on a voxel grid.

The maps (grey and white matter of the symmetric 2009a average, 1 mm) are files of the nilearn package, so
nothing is downloaded. They hold a brain without a skull; skull and scalp are shells at fixed distances from
the brain's outline, which at 3 mm is close enough to what a scanner shows.

An average of 152 brains is smooth. Two steps give a patient contours of their own: a displacement with a
coarse part (shape of the head) and a fine part (course of the sulci), and a soft maximum over the tissue
probabilities, disturbed by noise, which turns "60 % grey matter" into a cortex with an edge.

Reference: Fonov et al., Unbiased average age-appropriate brain templates from birth to adulthood,
NeuroImage 47 (2009) S102, https://doi.org/10.1016/S1053-8119(09)70884-5.
"""

import importlib.util
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ...privacy.errors import EnvironmentProblem

__all__ = ["TISSUES", "Anatomy", "Grid", "draw_anatomy", "smooth_field"]

Volume = NDArray[np.float32]
"""A scalar per voxel, shape (X, Y, Z), axes to the right, anterior, superior."""

TISSUES: Final = ("csf", "gm", "wm", "bone", "scalp", "base")
"""Cerebrospinal fluid, grey matter, white matter, skull, scalp, and the soft tissue below the brain."""

FIELD_OF_VIEW_MM: Final = (192.0, 240.0, 168.0)
CENTRE_MM: Final = (0.0, -18.0, 14.0)
"""Middle of the field of view in template coordinates: the whole head, from the pons to the scalp."""

TEMPLATE_STEP: Final = 2
"""The 1 mm maps are averaged over blocks of 2³ voxels: finer detail is lost at 3 mm anyway."""

VENTRICLES_MM: Final = np.array([0.0, -14.0, 14.0], np.float32)
VENTRICLES_SPREAD_MM: Final = np.array([26.0, 38.0, 22.0], np.float32)

SPLINE_DEVIATION: Final = (151 / 315) ** 1.5
"""Standard deviation of a cubic B-spline field over independent unit normals, in three dimensions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """Voxels of one scan: shape in voxels and voxel size in mm, axes right, anterior, superior."""

    shape: tuple[int, int, int]
    voxel_mm: tuple[float, float, float]

    @classmethod
    def covering_head(cls, voxel_mm: tuple[float, float, float]) -> "Grid":
        """The grid that covers the field of view with an even number of voxels along each axis."""
        x, y, z = (2 * round(extent / size / 2) for extent, size in zip(FIELD_OF_VIEW_MM, voxel_mm, strict=True))
        return cls(shape=(x, y, z), voxel_mm=voxel_mm)

    def axes_mm(self) -> list[Volume]:
        """Voxel centres along each axis in mm from the middle of the grid, shaped to broadcast to (X, Y, Z)."""
        x, y, z = (
            ((np.arange(n) - (n - 1) / 2) * size).astype(np.float32)
            for n, size in zip(self.shape, self.voxel_mm, strict=True)
        )
        return [x[:, None, None], y[None, :, None], z[None, None, :]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Anatomy:
    """One patient's head on ``grid``.

    ``tissue``: fraction of each of :data:`TISSUES` per voxel, shape (6, X, Y, Z), sum ≤ 1 (0 outside the head).
    ``height_mm``: superior template coordinate of each voxel, shape (X, Y, Z); 0 is the anterior commissure.
    """

    grid: Grid
    tissue: NDArray[np.float32]
    height_mm: Volume

    def fraction(self, name: str) -> Volume:
        """The fraction map of one tissue, shape (X, Y, Z)."""
        fraction: Volume = self.tissue[TISSUES.index(name)]
        return fraction


def smooth_field(generator: np.random.Generator, grid: Grid, spacing_mm: float, count: int = 1) -> NDArray[np.float32]:
    """Random fields of unit variance: cubic B-splines over a lattice of independent normals.

    Args:
        generator: source of the lattice values.
        grid: where the fields are evaluated.
        spacing_mm: distance of lattice points; structures are about twice as large.
        count: number of independent fields.

    Returns:
        Fields of shape (count, X, Y, Z).
    """
    bases = [_spline_basis(n, size / spacing_mm) for n, size in zip(grid.shape, grid.voxel_mm, strict=True)]
    lattice = generator.standard_normal((count, *(basis.shape[1] for basis in bases)), dtype=np.float32)
    # Not a matrix product: BLAS may add in another order on another machine.
    field = np.einsum("xi,nijk->nxjk", bases[0], lattice)
    field = np.einsum("yj,nxjk->nxyk", bases[1], field)
    return np.asarray(np.einsum("zk,nxyk->nxyz", bases[2], field) / np.float32(SPLINE_DEVIATION), np.float32)


def draw_anatomy(generator: np.random.Generator, grid: Grid, *, age: float) -> Anatomy:
    """Draw one head.

    Args:
        generator: the patient's generator.
        grid: voxels to fill.
        age: years; ventricles widen with it.
    """
    from scipy.ndimage import map_coordinates

    where = _deform(generator, grid, age)
    maps, origin_mm = _template()
    indices = [(where[k] - origin_mm[k]) / TEMPLATE_STEP for k in range(3)]
    gm, wm, outside_brain, outside_skull = (map_coordinates(m, indices, order=1, mode="nearest") for m in maps)

    brain = np.clip(0.5 - outside_brain / 2.5, 0, 1)
    evidence = np.stack([np.clip(1 - gm - wm, 0, 1), gm, wm]) + np.float32(0.03)
    fine = smooth_field(generator, grid, 6.0, 2)
    evidence[0] *= np.exp(0.25 * fine[0])
    evidence[1] *= np.exp(0.25 * fine[1])
    evidence **= 2.5
    evidence *= brain / evidence.sum(0)

    skull_mm, scalp_mm = generator.uniform(5.0, 7.5), generator.uniform(4.0, 7.0)
    thickness = outside_skull + 0.8 * smooth_field(generator, grid, 60.0)[0]
    tissue = np.zeros((len(TISSUES), *grid.shape), np.float32)
    tissue[:3] = evidence
    free = 1 - brain
    fluid = free * np.clip(2.0 - outside_brain / 2.0, 0, 1)
    tissue[0] += fluid
    free = free - fluid
    tissue[3] = free * _shell(thickness, 2.0, 2.0 + skull_mm)
    tissue[4] = free * _shell(thickness, 2.0 + skull_mm, 2.0 + skull_mm + scalp_mm)
    tissue[5] = free * np.clip((2.0 - thickness) / 2.0 + 0.5, 0, 1)
    return Anatomy(grid=grid, tissue=tissue, height_mm=where[2])


def _deform(generator: np.random.Generator, grid: Grid, age: float) -> NDArray[np.float32]:
    """Template coordinates in mm that each voxel shows, shape (3, X, Y, Z): pose, size, shape, sulci, ventricles."""
    axes = grid.axes_mm()
    turn = np.eye(3) + _skew(generator.normal(0, np.deg2rad(3.0), 3))
    # 0.95: the template's brain is larger than most people's.
    matrix = (turn / generator.normal(0.95, 0.03, 3)).astype(np.float32)
    shift = generator.normal(0, 2.5, 3)
    where = 3.2 * smooth_field(generator, grid, 65.0, 3) + 1.2 * smooth_field(generator, grid, 16.0, 3)
    for k in range(3):
        where[k] += sum(matrix[k, i] * axes[i] for i in range(3)) + np.float32(CENTRE_MM[k] + shift[k])
    widen = np.clip(0.008 * (age - 45) + generator.normal(0, 0.06), -0.12, 0.42)
    offset = where - VENTRICLES_MM[:, None, None, None]
    nearness = np.exp(-0.5 * ((offset / VENTRICLES_SPREAD_MM[:, None, None, None]) ** 2).sum(0))
    return np.asarray(where - np.float32(widen) * nearness * offset, np.float32)


def _skew(angles: NDArray[np.float64]) -> NDArray[np.float64]:
    """Infinitesimal rotation about the three axes by ``angles`` in radians."""
    x, y, z = angles
    return np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])


def _shell(distance_mm: Volume, inner_mm: float, outer_mm: float) -> Volume:
    """Fraction of a shell between two distances, with edges 2 mm wide."""
    rise = np.clip((distance_mm - inner_mm) / 2.0 + 0.5, 0, 1)
    fall = np.clip((outer_mm - distance_mm) / 2.0 + 0.5, 0, 1)
    return np.asarray(rise * fall, np.float32)


def _spline_basis(count: int, step: float) -> NDArray[np.float32]:
    """Cubic B-spline weights of ``count`` samples, ``step`` lattice units apart: shape (count, lattice points)."""
    position = np.arange(count) * step
    distance = np.abs(position[:, None] - (np.arange(int(position[-1]) + 4) - 1.0)[None, :])
    near, far = 2 / 3 - distance**2 + distance**3 / 2, np.clip(2 - distance, 0, None) ** 3 / 6
    return np.where(distance < 1, near, far).astype(np.float32)


@lru_cache(maxsize=1)
def _template() -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Grey matter, white matter, and signed mm from brain and from skull: (4, X, Y, Z); mm of the first voxel."""
    import nibabel
    from scipy.ndimage import distance_transform_edt

    nib: Any = nibabel  # typed in part only
    spec = importlib.util.find_spec("nilearn")
    # Read by path: importing nilearn takes four seconds, and its loaders resample.
    folder = Path((spec.submodule_search_locations or [""])[0] if spec else "") / "datasets" / "data"
    maps: list[Volume] = []
    affine = np.eye(4)
    for name in ("gm", "wm"):
        path = folder / f"mni_icbm152_{name}_tal_nlin_sym_09a_converted.nii.gz"
        if not path.is_file():
            raise EnvironmentProblem(
                f"the ICBM152 map {path} is missing; install nilearn 0.12 or later (pip install nilearn)"
            )
        image = nib.load(path)
        affine = image.affine
        maps.append(_coarser(np.asarray(image.dataobj, np.float32) / np.float32(255)))
    gm, wm = maps
    brain = _filled(gm + wm)
    step = float(TEMPLATE_STEP)

    def signed_mm(mask: NDArray[np.bool_]) -> Volume:
        outside, inside = (np.asarray(distance_transform_edt(side, sampling=step)) for side in (~mask, mask))
        return np.asarray(outside - inside, np.float32)

    outside_brain = signed_mm(brain)
    # The skull follows the brain's convex outline: grow by 24 mm, shrink by as much (a closing).
    hull = signed_mm(signed_mm(outside_brain < 24) < -24)
    origin = affine[:3, 3] + (TEMPLATE_STEP - 1) / 2
    return np.stack([gm, wm, outside_brain, hull]), origin.astype(np.float32)


def _coarser(volume: Volume) -> Volume:
    """Means over blocks of :data:`TEMPLATE_STEP`³ voxels; a remainder at the far edges is dropped."""
    x, y, z = (n // TEMPLATE_STEP for n in volume.shape)
    cut = volume[: x * TEMPLATE_STEP, : y * TEMPLATE_STEP, : z * TEMPLATE_STEP]
    blocks = cut.reshape(x, TEMPLATE_STEP, y, TEMPLATE_STEP, z, TEMPLATE_STEP)
    return np.asarray(blocks.mean((1, 3, 5)), np.float32)


def _filled(tissue: Volume) -> NDArray[np.bool_]:
    """The brain with its ventricles: where there is tissue, closed and without holes."""
    from scipy.ndimage import binary_closing, binary_fill_holes

    padded = np.pad(tissue > 0.3, 8, mode="edge")
    closed = np.asarray(binary_closing(padded, iterations=3), np.bool_)
    for plane in range(closed.shape[2]):
        closed[:, :, plane] = binary_fill_holes(closed[:, :, plane])
    return np.asarray(closed[8:-8, 8:-8, 8:-8], np.bool_)

# SPDX-License-Identifier: Apache-2.0
"""How heads lie: each against the others, and all against the template.

A head's cube is compared with the mean of the others in all 48 ways to turn and mirror it. The right way wins clearly
where heads are told apart from their mirror images; left and right are nearly alike, so they are judged with a margin
of their own, and a flip that is not seen here shows where a mask or a second modality disagrees.
"""

from functools import cache
from itertools import permutations, product
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from .catalogue import Finding
from .look import SIDE, Look, cube_of, foreground_of

__all__ = ["TURNS", "judge_orientation", "turned"]

FEWEST: Final = 4
MARGIN: Final = 0.05
"""Another way must win by this much correlation."""
SURE: Final = 0.6
"""Below this correlation with the mean the images are too unlike to say anything."""

STEADY: Final = 0.7
"""Median correlation with the mean from which on single slices are judged: below, they show several planes."""

Turn = tuple[tuple[int, int, int], tuple[int, int, int]]
TURNS: Final[tuple[Turn, ...]] = tuple(
    ((p[0], p[1], p[2]), (s[0], s[1], s[2])) for p in permutations(range(3)) for s in product((1, -1), repeat=3)
)
SAME: Final[Turn] = (0, 1, 2), (1, 1, 1)
LEFT_RIGHT: Final[Turn] = (0, 1, 2), (-1, 1, 1)
_AXES: Final = ("left and right", "front and back", "top and bottom")


def turned(cube: NDArray[Any], turn: Turn) -> NDArray[Any]:
    """The cube with axes exchanged and mirrored."""
    order, signs = turn
    return cube.transpose(order)[tuple(slice(None, None, s) for s in signs)]


def words_of(turn: Turn) -> str:
    """The turn for people."""
    order, signs = turn
    if order == (0, 1, 2):
        return "with " + " and ".join(_AXES[i] for i in range(3) if signs[i] < 0) + " exchanged"
    return "turned on its side"


def judge_orientation(looks: list[Look]) -> list[Finding]:
    """Images of one modality against each other and against the template."""
    usable = [look for look in looks if look.cube is not None]
    if len(usable) < FEWEST:
        return []
    cubes = np.stack([look.cube for look in usable if look.cube is not None]).astype(np.float64)
    total = cubes.sum(axis=0)
    turns = [best_turn(cube, (total - cube) / (len(cubes) - 1)) for cube in cubes]
    if all(min(look.shape) == 1 for look in usable) and np.median([best - gain for _, gain, best in turns]) < STEADY:
        patients = tuple(sorted({look.file.patient for look in usable}))
        return [Finding("orientation-unjudged", patients, f"{usable[0].file.what}: {len(usable)} slices")]
    findings = []
    for look, (turn, gain, best) in zip(usable, turns, strict=True):
        if turn != SAME and gain > MARGIN and best > SURE:
            findings.append(
                Finding(
                    "orientation-odd",
                    (look.file.patient,),
                    f"{look.file.path.name}: fits the others best {words_of(turn)} "
                    f"({best:.2f} against {best - gain:.2f})",
                )
            )
    if not findings and all(_whole_head(look) for look in usable):
        turn, gain, best = best_turn(total / len(cubes), _template())
        if turn not in (SAME, LEFT_RIGHT) and gain > 2 * MARGIN and best > SURE - 0.1:
            patients = tuple(sorted({look.file.patient for look in usable}))
            findings.append(Finding("orientation-cohort", patients, f"{usable[0].file.what}: {words_of(turn)}"))
    return findings


def best_turn(cube: NDArray[np.float64], mean: NDArray[np.float64]) -> tuple[Turn, float, float]:
    """The way to turn ``cube`` that suits ``mean`` best, by how much it wins over leaving it, its correlation."""
    flat, other = cube.ravel() - cube.mean(), mean.ravel() - mean.mean()
    norm = float(np.linalg.norm(flat) * np.linalg.norm(other))
    scores = flat[_places()] @ other / norm if norm else np.zeros(len(TURNS))
    best = int(scores.argmax())
    return TURNS[best], float(scores[best] - scores[TURNS.index(SAME)]), float(scores[best])


@cache
def _places() -> NDArray[np.int64]:
    """Where each voxel of a turned cube comes from, (48, voxels)."""
    places = np.arange(SIDE**3).reshape(SIDE, SIDE, SIDE)
    return np.stack([turned(places, turn).ravel() for turn in TURNS])


def _whole_head(look: Look) -> bool:
    """At least 100 mm in every direction, by the header."""
    return look.spacing is not None and all(n * s >= 100 for n, s in zip(look.shape, look.spacing, strict=True))


@cache
def _template() -> NDArray[np.float64]:
    """The cube of the ICBM152 average T1w that nilearn carries."""
    import nibabel
    from nilearn.datasets import load_mni152_template

    image = nibabel.as_closest_canonical(load_mni152_template(resolution=4))  # type: ignore[no-untyped-call]
    data = np.asarray(image.dataobj, np.float32)
    return cube_of(data, foreground_of(data)).astype(np.float64)

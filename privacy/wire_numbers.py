# SPDX-License-Identifier: Apache-2.0
"""Rounded updates with error feedback: what a site sends in place of 32-bit weights.

What is rounded is the *change* of the weights in a round, which the coordinator adds to the model that it sent. Its
numbers are small beside the weights, so the same bits say more. Forms:

    float16, bfloat16   each number by itself, to nearest; bfloat16 travels as the 16 bits (uint16), numpy has none
    int8                256 numbers share a scale s = max|x| / 127; each becomes round(x / s). Scales are float32

Error feedback: the site keeps r = x - rounded(x) and rounds x + r in its next round, so that over rounds all that was
learned arrives. Rounding is deterministic: every engine, and every retry, gives the same bits.

Privacy: with ``privacy.mode = "local"`` x is the difference of a noised model and a public one, and r is a function of
earlier ones. So what is sent is post-processing of what the accountant charged: it costs nothing, and hides nothing.

References: Seide et al. 2014, 1-Bit SGD, https://doi.org/10.21437/Interspeech.2014-274; Karimireddy et al. 2019, Error
Feedback Fixes SignSGD, https://arxiv.org/abs/1901.09847; Dettmers 2016 (scales of blocks), https://arxiv.org/abs/1511.04561.
"""

from collections.abc import Mapping
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from .contract import Arrays, Shapes

__all__ = ["BLOCK", "SCALE", "Form", "decode", "encode", "encoded_shapes", "relative_error", "with_feedback"]

Form = Literal["float32", "float16", "bfloat16", "int8"]
Floats = Mapping[str, NDArray[np.float32]]

BLOCK: Final = 256
"""Numbers that share one scale."""
SCALE: Final = "scale/"
"""Before the name of an array: its scales."""

_DTYPES: Final = {"float16": "float16", "bfloat16": "uint16", "int8": "int8"}


def encoded_shapes(shapes: Shapes, form: Form) -> Shapes:
    """Names, shapes and dtypes in which arrays of these ``shapes`` travel.

    Example:
        >>> encoded_shapes({"w": ((3, 100), "float32")}, "int8")
        {'w': ((3, 100), 'int8'), 'scale/w': ((2,), 'float32')}
    """
    if form == "float32":
        return shapes
    found: dict[str, tuple[tuple[int, ...], str]] = {}
    for name, (shape, _) in shapes.items():
        found[name] = (shape, _DTYPES[form])
        if form == "int8":
            found[SCALE + name] = ((_blocks(int(np.prod(shape, dtype=np.int64))),), "float32")
    return found


def encode(arrays: Floats, form: Form) -> dict[str, NDArray[np.generic]]:
    """Round ``arrays``.

    Args:
        arrays: float32, finite, at most 65504 in size.
        form: as in ``wire.up``, but for float32.

    Returns:
        Arrays as :func:`encoded_shapes` says.
    """
    found: dict[str, NDArray[np.generic]] = {}
    for name, array in arrays.items():
        if form == "float16":
            found[name] = array.astype(np.float16)
        elif form == "bfloat16":
            found[name] = _to_bfloat16(array)
        else:
            found[name], found[SCALE + name] = _to_int8(array)
    return found


def decode(arrays: Arrays, form: Form) -> dict[str, NDArray[np.float32]]:
    """What :func:`encode` rounded to; arrays must be of the shapes and dtypes that were agreed.

    bfloat16 has patterns that are not finite: check the result.
    """
    found: dict[str, NDArray[np.float32]] = {}
    for name, array in arrays.items():
        if name.startswith(SCALE):
            continue
        if form == "bfloat16":
            found[name] = np.asarray(array.astype(np.uint32) << np.uint32(16)).view(np.float32)
        elif form == "int8":
            found[name] = _from_int8(array, arrays[SCALE + name])
        else:
            found[name] = array.astype(np.float32)
    return found


def with_feedback(
    update: Floats, residual: Floats, form: Form
) -> tuple[dict[str, NDArray[np.generic]], dict[str, NDArray[np.float32]], dict[str, NDArray[np.float32]]]:
    """Round ``update`` and what earlier rounding left over.

    Args:
        update: change of the weights in this round.
        residual: what was left over before, or nothing.
        form: not float32.

    Returns:
        What travels; what the other side will read; what is left over now.
    """
    wanted = {name: np.asarray(array + residual[name]) if name in residual else array for name, array in update.items()}
    sent = encode(wanted, form)
    read = decode(sent, form)
    return sent, read, {name: np.asarray(wanted[name] - array) for name, array in read.items()}


def relative_error(residual: Floats, read: Floats) -> float:
    """Length of what is left over, as a share of what was sent; 0 where nothing was sent."""
    left, length = (sum(float(np.sum(np.square(a, dtype=np.float64))) for a in m.values()) for m in (residual, read))
    return float(np.sqrt(left / length)) if length else 0.0


def _blocks(size: int) -> int:
    return -(-size // BLOCK)


def _to_bfloat16(array: NDArray[np.float32]) -> NDArray[np.uint16]:
    """To nearest, ties to even: add half of the last kept place, less one where that place is even."""
    bits = np.asarray(array, np.float32, order="C").view(np.uint32)
    even = (bits >> np.uint32(16)) & np.uint32(1)
    return np.asarray((bits + np.uint32(0x7FFF) + even) >> np.uint32(16)).astype(np.uint16)


def _to_int8(array: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    flat = np.zeros(_blocks(array.size) * BLOCK, np.float32)
    flat[: array.size] = array.reshape(-1)
    blocks = flat.reshape(-1, BLOCK)
    scales = (np.abs(blocks).max(axis=1, initial=0) / np.float32(127)).astype(np.float32)
    safe = np.where(scales > 0, scales, np.float32(1))[:, None]
    steps = np.clip(np.rint(blocks / safe), -127, 127) * (scales > 0)[:, None]
    return steps.astype(np.int8).reshape(-1)[: array.size].reshape(array.shape), scales


def _from_int8(array: NDArray[np.generic], scales: NDArray[np.generic]) -> NDArray[np.float32]:
    each = np.repeat(scales.astype(np.float32), BLOCK)[: array.size]
    return (array.reshape(-1).astype(np.float32) * each).reshape(array.shape)

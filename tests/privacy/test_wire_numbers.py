# SPDX-License-Identifier: Apache-2.0
"""Rounded updates: against torch, by hand, and that error feedback loses nothing for good."""

import math
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from fedneuro.privacy.contract import shapes_of
from fedneuro.privacy.wire_numbers import (
    BLOCK,
    SCALE,
    Form,
    decode,
    encode,
    encoded_shapes,
    relative_error,
    with_feedback,
)

Floats = NDArray[np.float32]
ROUNDED: tuple[Form, ...] = get_args(Form)[1:]

floats = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=20),
    elements=st.floats(-8192, 8192, width=32),
)


@given(floats, st.sampled_from(ROUNDED))
def test_what_travels_has_the_agreed_shapes_and_is_near(array: Floats, form: Form) -> None:
    sent = encode({"w": array}, form)
    assert shapes_of(sent) == encoded_shapes(shapes_of({"w": array}), form)
    read = decode(sent, form)["w"]
    assert read.dtype == np.float32 and read.shape == array.shape
    largest = float(np.abs(array).max(initial=0))
    bound = {"float16": np.abs(array) * 2.0**-11 + 2.0**-25, "bfloat16": np.abs(array) * 2.0**-8 + 1e-38}
    allowed = bound.get(form, largest / 127 * 0.5001 + 1e-38)
    assert (np.abs(read.astype(np.float64) - array) <= allowed).all()


@given(floats)
def test_bfloat16_as_torch(array: Floats) -> None:
    read = decode(encode({"w": array}, "bfloat16"), "bfloat16")["w"]
    np.testing.assert_array_equal(read, torch.from_numpy(array.copy()).to(torch.bfloat16).float().numpy())


def test_int8_by_hand() -> None:
    """Largest 254: the scale is 2. 3 / 2 = 1.5 rounds to the even 2, and is read as 4; -127 / 2 = -63.5 to -64."""
    sent = encode({"w": np.array([254, 3, -127, 0], np.float32)}, "int8")
    assert sent["w"].tolist() == [127, 2, -64, 0] and sent[SCALE + "w"].tolist() == [2]
    assert decode(sent, "int8")["w"].tolist() == [254, 4, -128, 0]


def test_each_block_has_its_own_scale() -> None:
    array = np.concatenate([np.full(BLOCK, 1e-3, np.float32), np.full(3, 100, np.float32)])
    np.testing.assert_allclose(decode(encode({"w": array}, "int8"), "int8")["w"], array, rtol=1e-6)


def test_a_block_of_zeros_and_one_too_small_for_a_scale() -> None:
    array = np.array([0.0, 1e-44, -1e-44], np.float32)
    assert decode(encode({"w": array}, "int8"), "int8")["w"].tolist() == [0, 0, 0]


def test_bytes_of_a_million_weights() -> None:
    array = {"w": np.zeros((1000, 1000), np.float32)}
    sizes = {form: sum(a.nbytes for a in encode(array, form).values()) for form in ROUNDED}
    assert sizes == {"float16": 2_000_000, "bfloat16": 2_000_000, "int8": 1_000_000 + 4 * math.ceil(1e6 / BLOCK)}


@pytest.mark.parametrize("form", ROUNDED)
def test_feedback_loses_nothing_and_rounding_alone_does(form: Form) -> None:
    """Thirty equal updates: what was read adds up to what was meant but for one rounding, not thirty."""
    update = {"w": np.random.default_rng(0).normal(0, 1e-2, 1000).astype(np.float32)}
    read, plain = np.zeros(1000), np.zeros(1000)
    residual: dict[str, Floats] = {}
    changes: dict[str, Floats] = {}
    for _ in range(30):
        _, changes, residual = with_feedback(update, residual, form)
        read += changes["w"]
        plain += decode(encode(update, form), form)["w"]
    meant = 30 * update["w"].astype(np.float64)
    np.testing.assert_allclose(read + residual["w"], meant, atol=1e-6)
    assert np.abs(read - meant).max() < np.abs(plain - meant).max() / 5
    assert 0 < relative_error(residual, changes) < 0.02


def test_no_update_has_no_error() -> None:
    nothing = {"w": np.zeros(4, np.float32)}
    assert relative_error(nothing, nothing) == 0

# SPDX-License-Identifier: Apache-2.0
"""The weighted mean: right to float32, and the same bits in any order."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedneuro.privacy.contract import MAX_ABSOLUTE
from fedneuro.server.aggregation import WeightedMean


def _mean(states: list[np.ndarray], weights: list[int], order: tuple[int, ...]) -> np.ndarray:
    mean = WeightedMean(capacity=sum(weights))
    for index in order:
        mean.fold({"w": states[index]}, weights[index])
    return mean.result()["w"]


def test_by_hand() -> None:
    """(1·1 + 2·4 + 3·7) / 6 = 5."""
    states = [np.array([[v]], np.float32) for v in (1, 4, 7)]
    assert _mean(states, [1, 2, 3], (0, 1, 2)).tolist() == [[5.0]]


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1.0, 100.0, MAX_ABSOLUTE / 8])
def test_every_order_gives_the_same_bits(scale: float) -> None:
    rng = np.random.default_rng(0)
    states = [(scale * rng.standard_normal(100_003)).astype(np.float32) for _ in range(4)]
    weights = [35, 10, 125, 5]
    results = {_mean(states, weights, order).tobytes() for order in itertools.permutations(range(4))}
    assert len(results) == 1


def test_a_plain_running_sum_would_fail_the_order_test() -> None:
    rng = np.random.default_rng(0)
    states = [rng.standard_normal(1000).astype(np.float32) for _ in range(4)]
    sums = set()
    for order in itertools.permutations(range(4)):
        total = np.zeros(1000, np.float32)
        for index in order:
            total += states[index]
        sums.add(total.tobytes())
    assert len(sums) > 1


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.floats(-50, 50, width=32), st.integers(1, 500)), min_size=1, max_size=12),
)
def test_close_to_exact_sum(pairs: list[tuple[float, int]]) -> None:
    """math.fsum is exact; the grid may cost 2^-51 of the bound per site."""
    total = sum(w for _, w in pairs)
    exact = math.fsum(v * w for v, w in pairs) / total
    found = float(
        _mean([np.array([v], np.float32) for v, _ in pairs], [w for _, w in pairs], tuple(range(len(pairs))))[0]
    )
    assert abs(found - exact) <= abs(np.spacing(np.float32(exact))) + len(pairs) * MAX_ABSOLUTE * 2.0**-50


def test_result_is_read_only_and_keeps_dtype() -> None:
    mean = WeightedMean(capacity=2)
    mean.fold({"a": np.ones(3, np.float32), "b": np.array([2, 4], np.int64)}, 2)
    result = mean.result()
    assert result["a"].dtype == np.float32 and result["b"].tolist() == [2, 4]
    with pytest.raises(ValueError, match="read-only"):
        result["a"][0] = 1


@pytest.mark.parametrize("weight", [0, -1, 3])
def test_weight_out_of_range(weight: int) -> None:
    with pytest.raises(ValueError, match="weight"):
        WeightedMean(capacity=2).fold({"a": np.ones(1, np.float32)}, weight)


def test_mean_of_nothing() -> None:
    with pytest.raises(ValueError, match="no reply"):
        WeightedMean(capacity=1).result()

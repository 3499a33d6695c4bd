# SPDX-License-Identifier: Apache-2.0
"""Every strategy on numbers derived by hand, on any order of replies, and resumed half-way with the same bits."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fedneuro.models.state import digest
from fedneuro.privacy.errors import QuorumLost, StudyError
from fedneuro.privacy.study import Study
from fedneuro.server.strategies import STRATEGIES, Strategy, build_strategy
from fedneuro.server.strategies.krum import squared_distances

Floats = NDArray[np.float32]
Update = tuple[list[float], int]


def study_of(name: str, **keys: Any) -> Study:
    training: dict[str, Any] = {"rounds": 5, "local_steps": 2, "optimizer": "sgd", "learning_rate": 0.5}
    evaluation = {"select": "last"} if name == "ditto" else {}
    return Study.parse(
        {
            "study": {"name": "toy"},
            "training": training,
            "privacy": {"mode": "none"},
            "strategy": {"name": name, **keys},
            "evaluation": evaluation,
        }
    )


def vector(*values: float) -> dict[str, Floats]:
    return {"w": np.array(values, np.float32)}


def play(strategy: Strategy, model: Mapping[str, Any], replies: Sequence[Update], asked: Sequence[int] = ()) -> Floats:
    """One round: the next model's ``w``."""
    strategy.begin(model, asked or [size for _, size in replies])
    for values, size in replies:
        strategy.fold(vector(*values), size)
    return np.asarray(strategy.finish()["w"], np.float32)


# -- by hand ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fedavg", "fedprox", "fedbn", "ditto"])
def test_the_weighted_mean(name: str) -> None:
    """(10 · 1 + 30 · 5) / 40 = 4."""
    assert play(build_strategy(study_of(name)), vector(0), [([1], 10), ([5], 30)]).tolist() == [4]


def test_fedavgm() -> None:
    """From 0 with β = 1/2 and rate 1/4: Δ = 4, v = 4, x = 1. Then Δ = 3 - 1 = 2, v = 2 + 2 = 4, x = 2."""
    strategy = build_strategy(study_of("fedavgm", momentum=0.5, learning_rate=0.25))
    assert play(strategy, vector(0), [([3], 1), ([5], 1)]).tolist() == [1]
    assert play(strategy, vector(1), [([3], 1)]).tolist() == [2]


@pytest.mark.parametrize(
    ("name", "squares"),
    # τ = 1, so v begins at 1. Round 1: Δ = 2, Δ² = 4. Round 2: Δ = -1, Δ² = 1. With β2 = 1/2:
    [
        ("fedadam", (2.5, 1.75)),  # (1 + 4) / 2; (2.5 + 1) / 2
        ("fedyogi", (3.0, 2.5)),  # 1 + 4 / 2, for 1 < 4; 3 - 1 / 2, for 3 > 1
        ("fedadagrad", (5.0, 6.0)),  # 1 + 4; 5 + 1
    ],
)
def test_adaptive_steps(name: str, squares: tuple[float, float]) -> None:
    """β1 = 1/2: m = 1 after round 1 and 0 after round 2; the step is 2 m / (√v + 1)."""
    keys = {"momentum": 0.5, "adaptivity": 1.0, "learning_rate": 2.0}
    strategy = build_strategy(study_of(name, **keys, **({} if name == "fedadagrad" else {"second_moment": 0.5})))
    first = play(strategy, vector(10), [([12], 1)])
    np.testing.assert_allclose(first, [10 + 2 / (np.sqrt(squares[0]) + 1)], rtol=1e-6)
    second = play(strategy, vector(10), [([9], 1)])
    np.testing.assert_allclose(second, [10], rtol=1e-6)
    np.testing.assert_allclose(np.asarray(strategy.state()["second"]["w"], np.float32), [squares[1]], rtol=1e-6)


def test_adaptive_step_sizes_default_to_a_hundredth() -> None:
    assert study_of("fedyogi").strategy.step_size == 0.01 and study_of("fedavgm").strategy.step_size == 1.0


def test_scaffold() -> None:
    """K η = 2 · 1/2 = 1, so the variate is x less the even mean of y.

    Round 1, x = 0: y = 1 (weight 10) and 5 (weight 30). Model (10 + 150) / 40 = 4; c = 0 - 3 = -3.
    Round 2, x = 4, only the first answers with y = 2: model 2; c = 1/2 · (-3) + 1/2 · (4 - 2) = -1/2.
    """
    strategy = build_strategy(study_of("scaffold"))
    assert strategy.extra() == {}
    assert play(strategy, vector(0), [([1], 10), ([5], 30)]).tolist() == [4]
    assert {name: array.tolist() for name, array in strategy.extra().items()} == {"control/w": [-3]}
    assert play(strategy, vector(4), [([2], 10)], asked=[10, 30]).tolist() == [2]
    assert strategy.extra()["control/w"].tolist() == [-0.5]


def test_scaffold_takes_part_of_the_step() -> None:
    strategy = build_strategy(study_of("scaffold", learning_rate=0.5, weighting="equal"))
    assert play(strategy, vector(2), [([3], 10), ([9], 30)]).tolist() == [4]  # 2 + 1/2 · (6 - 2)


def test_trimmed_mean_leaves_out_the_extremes_of_each_weight() -> None:
    """Of five, floor(0.2 · 5) = 1 at each end: (1 + 2 + 3) / 3 and (10 + 20 + 30) / 3; sizes do not count."""
    updates: list[Update] = [([1, 99], 1), ([2, 10], 1), ([-50, 20], 9), ([3, 30], 1), ([77, -99], 999)]
    assert play(build_strategy(study_of("trimmed_mean")), vector(0, 0), updates).tolist() == [2, 20]


def test_median_of_odd_and_even() -> None:
    strategy = build_strategy(study_of("median"))
    assert play(strategy, vector(0), [([5], 1), ([1], 1), ([1e3], 99)]).tolist() == [5]
    assert play(strategy, vector(0), [([5], 1), ([1], 1), ([1e3], 99), ([4], 1)]).tolist() == [4.5]


def test_krum() -> None:
    """n = 5, f = 1: the two nearest count. 0, 1, 3, 4.5 and a hostile 100: squared distances give

    0: 1 + 9 = 10; 1: 1 + 4 = 5; 3: 2.25 + 4 = 6.25; 4.5: 2.25 + 12.25 = 14.5; 100: far. 1 wins; of two, 1 and 3.
    """
    updates: list[Update] = [([0], 1), ([4.5], 1), ([100], 999), ([1], 1), ([3], 1)]
    assert play(build_strategy(study_of("krum")), vector(0), updates).tolist() == [1]
    assert play(build_strategy(study_of("krum", keep=2)), vector(0), updates).tolist() == [2]


def test_distances_of_krum_do_not_cancel() -> None:
    """Weights of 1000 that differ by 2^-13: in float32, ‖x‖² + ‖y‖² - 2 x·y would give 0 or noise."""
    apart = 2.0**-13
    found = squared_distances([vector(1000.0, 1.0), vector(1000.0 + apart, 1.0), vector(1000.0, 1.0)])
    assert found.tolist() == [[0, apart**2, 0], [apart**2, 0, apart**2], [0, apart**2, 0]]


# -- what a hostile site can do ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["trimmed_mean", "median", "krum"])
def test_one_hostile_site_cannot_move_the_model_far(name: str) -> None:
    rng = np.random.default_rng(0)
    honest: list[Update] = [(rng.normal(1, 0.1, 8).tolist(), 10) for _ in range(5)]
    hostile: Update = ([-4096.0] * 8, 10**6)
    robust = play(build_strategy(study_of(name)), vector(*[0.0] * 8), [*honest, hostile])
    assert np.abs(robust - 1).max() < 0.5
    assert np.abs(play(build_strategy(study_of("fedavg")), vector(*[0.0] * 8), [*honest, hostile]) - 1).max() > 1000


# -- too few sites -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "keys", "sites", "match"),
    [
        ("trimmed_mean", {}, 4, "leaves out none of 4 training sites: set it to 0.25 or more"),
        ("trimmed_mean", {"trim": 0.4}, 2, "needs three sites"),
        ("krum", {}, 4, r"needs 5 training sites \(2 f \+ 3\), not 4"),
        ("krum", {"byzantine": 2}, 6, "needs 7 training sites"),
        ("krum", {"keep": 3}, 5, r"at most 2 \(n - f - 2\)"),
    ],
)
def test_too_few_sites_for_the_method_are_a_fault_of_the_study(
    name: str, keys: dict[str, Any], sites: int, match: str
) -> None:
    with pytest.raises(StudyError, match=match):
        build_strategy(study_of(name, **keys)).begin(vector(0), [10] * sites)


@pytest.mark.parametrize("name", ["trimmed_mean", "krum"])
def test_too_few_answers_end_the_round_and_can_be_resumed(name: str) -> None:
    with pytest.raises(QuorumLost, match="--resume"):
        play(build_strategy(study_of(name)), vector(0), [([1], 1), ([2], 1)], asked=[1] * 5)


# -- order and resume --------------------------------------------------------------------------------------------


def random_round(number: int) -> list[tuple[dict[str, Floats], int]]:
    rng = np.random.default_rng(number)
    shapes = {"a": (3, 2), "b": (70_000,), "c": ()}
    return [({n: rng.normal(size=s).astype(np.float32) for n, s in shapes.items()}, 10 * (i + 1)) for i in range(5)]


def step(strategy: Strategy, model: Mapping[str, Any], replies: list[tuple[dict[str, Floats], int]]) -> dict[str, Any]:
    strategy.begin(model, [size for _, size in replies])
    for arrays, size in replies:
        strategy.fold(arrays, size)
    return dict(strategy.finish())


@pytest.mark.parametrize("name", STRATEGIES)
def test_the_order_of_arrival_changes_no_bit(name: str) -> None:
    model, replies = random_round(9)[0][0], random_round(1)
    found = {
        digest(step(build_strategy(study_of(name)), model, list(order)))
        for order in itertools.islice(itertools.permutations(replies), 0, 120, 17)
    }
    assert len(found) == 1


@pytest.mark.parametrize("name", STRATEGIES)
def test_resumed_half_way_gives_the_same_bits(name: str) -> None:
    study = study_of(name)
    model: dict[str, Any] = random_round(9)[0][0]
    shapes = {key: (array.shape, array.dtype) for key, array in model.items()}
    whole = build_strategy(study)
    for number in (1, 2):
        model = step(whole, model, random_round(number))
    saved = {group: {key: array.copy() for key, array in arrays.items()} for group, arrays in whole.state().items()}
    resumed = build_strategy(study)
    resumed.load_state(saved)
    assert digest(dict(resumed.extra())) == digest(dict(whole.extra()))
    one, other = step(whole, model, random_round(3)), step(resumed, model, random_round(3))
    assert digest(one) == digest(other)
    assert {key: (array.shape, array.dtype) for key, array in one.items()} == shapes
    if saved and name != "scaffold":  # where all answer, its variate is made anew: see extra() above
        assert digest(step(build_strategy(study), model, random_round(3))) != digest(one)

# SPDX-License-Identifier: Apache-2.0
"""Noise: the right distribution, the wrong ones rejected, and nobody who can replay it."""

import copy
import os
import pickle
import random

import numpy as np
import pytest
import torch
from scipy import stats

from fedneuro.privacy.noise import SecureRandom

# The generator cannot be seeded, so statistical tests use thresholds that a right generator misses once in 1e9 runs.
ONCE_IN_A_BILLION = 1e-9
N = 200_000


def test_normal_numbers_have_unit_variance_and_no_other() -> None:
    """The same test that accepts σ must reject 0.9 σ and 1.1 σ."""
    draws = SecureRandom().normal(N)
    assert stats.kstest(draws, "norm").pvalue > ONCE_IN_A_BILLION
    for factor in (0.9, 1.1):
        assert stats.kstest(draws * factor, "norm").pvalue < ONCE_IN_A_BILLION


def test_the_variance_is_exact_to_the_sample_size() -> None:
    """Σx² is χ² with N degrees of freedom; the fourth moment, 3, would show clipped tails."""
    draws = SecureRandom().normal(N)
    assert abs(np.square(draws).sum() - N) < 6.2 * np.sqrt(2 * N)
    assert abs(np.power(draws, 4).mean() - 3) < 6.2 * np.sqrt(96 / N)
    assert np.abs(draws).max() > 4


def test_neighbours_in_the_stream_are_independent() -> None:
    """Cosine and sine of one pair lie half a chunk apart; successive ones come from successive words."""
    draws = SecureRandom().normal(1 << 16)
    for lag in (1, 2, 1 << 13, 1 << 14):
        assert abs(np.corrcoef(draws[lag:], draws[:-lag])[0, 1]) < 6.2 / np.sqrt(len(draws) - lag)
        squares = np.corrcoef(draws[lag:] ** 2, draws[:-lag] ** 2)[0, 1]
        assert abs(squares) < 6.2 / np.sqrt(len(draws) - lag)


@pytest.mark.parametrize("n", [0, 1, 2, 3, (1 << 14) - 1, (1 << 14) + 1])
def test_any_number_of_draws(n: int) -> None:
    generator = SecureRandom()
    for draws in (generator.normal(n), generator.uniform(n)):
        assert draws.shape == (n,)
        assert draws.dtype == np.float64
        assert np.isfinite(draws).all()
        assert len(np.unique(draws)) == n


def test_uniform_numbers() -> None:
    draws = SecureRandom().uniform(N)
    assert draws.min() >= 0
    assert draws.max() < 1
    assert stats.kstest(draws, "uniform").pvalue > ONCE_IN_A_BILLION
    assert np.array_equal(draws * 2.0**53, np.floor(draws * 2.0**53)), "multiples of 2^-53"


def test_poisson_sampling_chooses_each_alone() -> None:
    """5000 samples of 40 patients at q = 0.25: each patient's share, and the spread of the sizes, n·q·(1-q)."""
    generator = SecureRandom()
    chosen = np.zeros((5000, 40), bool)
    for row in chosen:
        row[generator.poisson_sample(40, 0.25)] = True
    shares = chosen.mean(0)
    assert np.abs(shares - 0.25).max() < 6.5 * np.sqrt(0.25 * 0.75 / 5000)
    sizes = chosen.sum(1)
    assert (
        stats.chisquare(
            np.bincount(np.clip(sizes, 4, 16), minlength=17)[4:],
            5000 * np.diff([0, *stats.binom.cdf(range(4, 16), 40, 0.25), 1]),
        ).pvalue
        > ONCE_IN_A_BILLION
    )
    assert abs(np.corrcoef(chosen[:, 0], chosen[:, 1])[0, 1]) < 6.2 / np.sqrt(5000)


def test_poisson_sampling_at_its_ends() -> None:
    generator = SecureRandom()
    assert generator.poisson_sample(5, 1.0).tolist() == [0, 1, 2, 3, 4]
    assert generator.poisson_sample(5, 1e-300).tolist() == []
    assert generator.poisson_sample(0, 0.5).tolist() == []


def test_two_instances_share_nothing() -> None:
    a, b = SecureRandom().normal(N), SecureRandom().normal(N)
    assert not np.intersect1d(a, b).size
    assert abs(np.corrcoef(a, b)[0, 1]) < 6.2 / np.sqrt(N)


def test_no_seed_has_an_influence() -> None:
    from monai.utils.misc import set_determinism

    def seeded() -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        set_determinism(0)
        try:
            return SecureRandom().normal(100)
        finally:
            set_determinism(None)

    assert not np.intersect1d(seeded(), seeded()).size


def test_a_generator_cannot_be_copied() -> None:
    generator = SecureRandom()
    for attempt in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="could replay the noise"):
            attempt(generator)


def test_a_forked_process_draws_other_numbers() -> None:
    generator = SecureRandom()
    generator.normal(3)
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(send, generator.normal(64).tobytes())
        os._exit(0)
    os.waitpid(child, 0)
    theirs = np.frombuffer(os.read(receive, 512))
    os.close(receive)
    os.close(send)
    assert not np.intersect1d(theirs, generator.normal(64)).size

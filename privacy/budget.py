# SPDX-License-Identifier: Apache-2.0
"""What a study may spend at a site, computed alike by the hospital, the coordinator and the planner.

Everything here follows from the study and from a *public* cohort size, so nothing in it is a secret and nobody
needs to send it. Unit: the patient. Neighbouring relation: zero-out of one patient.
"""

import math
from dataclasses import dataclass

from .accounting import GaussianEvent, calibrate
from .errors import BadInput
from .secagg.grid import SHARE
from .study import Study

__all__ = ["Budget", "evaluations", "metric_event", "site_delta", "training_event"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """The most that may ever be spent, over everything that is composed.

    Attributes:
        epsilon: ε, above 0; infinity where there is no bound.
        delta: the δ at which it is reckoned, in (0, 1).

    Raises:
        BadInput: a value is out of range.
    """

    epsilon: float
    delta: float

    def __post_init__(self) -> None:
        if not self.epsilon > 0:
            raise BadInput(f"budget: epsilon = {self.epsilon}: give a number above 0")
        if not 0 < self.delta < 1:
            raise BadInput(f"budget: delta = {self.delta}: give a probability between 0 and 1")


def site_delta(delta: float, public_size: int) -> float:
    """The δ of a site: the study's, or, where that is 0, the largest power of ten ≤ 1 / (10 × public cohort size).

    Example:
        >>> [site_delta(0.0, n) for n in (1, 10, 60, 100, 120)], site_delta(1e-5, 60)
        ([0.1, 0.01, 0.001, 0.001, 0.0001], 1e-05)

    Raises:
        BadInput: ``delta`` is not in [0, 1), or ``public_size`` is below 1.
    """
    if not 0 <= delta < 1:
        raise BadInput(f"delta = {delta}: give a probability below 1, or 0 for the site's own")
    if public_size < 1:
        raise BadInput(f"public cohort size = {public_size}: give at least 1")
    # 10^-k ≤ 1 / 10n means 10^k ≥ 10n: k is the number of digits of 10n - 1, in whole numbers without rounding.
    return delta or float(f"1e-{len(str(10 * public_size - 1))}")


def training_event(study: Study, public_size: int, *, steps: int | None = None) -> GaussianEvent:
    """The private steps of a site: σ for the whole study, and ``steps`` of them (all by default).

    Raises:
        BadInput: no sensible noise reaches the study's ε.
    """
    privacy = study.privacy
    # In mode "distributed" a millionth pays for the difference between whole numbers and Gaussians.
    part = 1 - SHARE if privacy.mode == "distributed" else 1.0
    delta = site_delta(privacy.delta, public_size) * part
    sigma = calibrate(privacy.epsilon * part, delta, privacy.sample_rate, study.total_steps)
    count = study.total_steps if steps is None else steps
    return GaussianEvent(sample_rate=privacy.sample_rate, noise_multiplier=sigma, count=count)


def evaluations(study: Study) -> int:
    """How often a site is asked for metrics: the untrained model, the study's rounds, and the chosen model."""
    every, rounds = study.evaluation.every, study.training.rounds
    return 1 + (1 + math.ceil(rounds / every) if every else 0)


def metric_event(study: Study, public_size: int) -> GaussianEvent:
    """One noised release of all metrics, where ``privacy.metrics`` is ``noise``: every evaluated patient takes part.

    Raises:
        BadInput: no sensible noise reaches ``privacy.metrics_epsilon``.
    """
    delta = site_delta(study.privacy.delta, public_size)
    sigma = calibrate(study.privacy.metrics_epsilon, delta, 1.0, evaluations(study))
    return GaussianEvent(sample_rate=1.0, noise_multiplier=sigma)

# SPDX-License-Identifier: Apache-2.0
"""``fedneuro-node budget``: what the ledger says was spent, what is left, and whether a planned study fits.

ε does not add up: "spent" and "with reserved" are compositions of their own, and "left" is the budget less the
latter. Reserved is what was charged for rounds that did not end (yet): a crash leaves it spent.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..privacy.accounting import GaussianEvent, epsilon
from ..privacy.budget import evaluations, metric_event, site_delta, training_event
from ..privacy.contract import Role
from ..privacy.ledger import Ledger
from ..privacy.ledger_chain import Entry, receipt_of
from ..privacy.study import Study
from .ledger_witness import check_witness
from .settings import SiteSettings

__all__ = ["Line", "Plan", "Statement", "plan_study", "statement"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A budget and what is gone of it.

    Attributes:
        dataset: identity of the data set.
        what: ``all studies``, or the study's hash, shortened, with what for.
        settled: ε of rounds that ended.
        charged: ε of all charges, settled or not.
        budget: ε; infinity where there is no bound.
        delta: δ of these numbers.
        charges: number of charges.
        open: number of charges that were not settled.
    """

    dataset: str
    what: str
    settled: float
    charged: float
    budget: float
    delta: float
    charges: int
    open: int

    @property
    def left(self) -> float:
        """ε up to the budget; never below 0."""
        return max(0.0, self.budget - self.charged)


@dataclass(frozen=True, slots=True, kw_only=True)
class Statement:
    """A verified ledger: its lines, data set by data set, and its head."""

    lines: Sequence[Line]
    verified: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a study would cost here, had it run to its end without a retry.

    Attributes:
        noise_multiplier: σ of the private steps; None for a held-out site.
        study: ε of the study, what it spent already included, and its budget.
        metrics: the same of noised metrics; None where they are not noised.
        lifetime: ε of the data set over all studies, this one included, and the hospital's budget.
        delta: δ of the study here.
        fits: whether every budget covers it.
    """

    noise_multiplier: float | None
    study: tuple[float, float]
    metrics: tuple[float, float] | None
    lifetime: tuple[float, float]
    delta: float
    fits: bool


def statement(settings: SiteSettings) -> Statement:
    """Read and verify the site's ledger.

    Raises:
        LedgerDistrusted: it was changed, put back, or is another hospital's.
        EnvironmentProblem: it cannot be read.
    """
    entries = _entries(settings)
    if not entries:
        return Statement(
            lines=(_line(settings.dataset_id, "all studies", [], set(), *_lifetime(settings)),), verified=""
        )
    settled = {entry.settles for entry in entries if entry.kind == "settle"}
    charges = [entry for entry in entries if entry.kind == "reserve"]
    lines = []
    for dataset in dict.fromkeys([settings.dataset_id, *(entry.dataset for entry in charges)]):
        here = [entry for entry in charges if entry.dataset == dataset]
        lines.append(_line(dataset, "all studies", here, settled, *_lifetime(settings)))
        for study, purpose in dict.fromkeys((entry.study, entry.purpose) for entry in here):
            own = [entry for entry in here if (entry.study, entry.purpose) == (study, purpose)]
            lines.append(_line(dataset, f"study {study[:12]} {purpose}", own, settled, own[-1].budget, own[-1].delta))
    head = receipt_of(entries[-1])
    return Statement(lines=lines, verified=f"{head.count} entries, chain and anchors verified, head {head.head}")


def plan_study(settings: SiteSettings, study: Study) -> Plan:
    """What ``study`` would cost at this site, and whether it fits. Charges nothing.

    Raises:
        LedgerDistrusted, EnvironmentProblem: as :func:`statement`.
        BadInput: no sensible noise reaches the study's ε.
    """
    privacy = study.privacy
    delta = site_delta(privacy.delta, settings.public_size)
    charges = [e for e in _entries(settings) if e.kind == "reserve" and e.dataset == settings.dataset_id]
    planned: list[GaussianEvent] = []

    def after(purpose: str, events: list[GaussianEvent]) -> float:
        spent = [e.event() for e in charges if e.study == study.hash and e.purpose == purpose]
        planned.extend(events)
        return epsilon([*spent, *events], delta)

    private, trains = privacy.mode != "none", settings.role is Role.TRAIN
    steps = [training_event(study, settings.public_size)] if private and trains else []
    training = (after("train", steps), privacy.epsilon)
    metrics = None
    if private and privacy.metrics == "noise":
        one = metric_event(study, settings.public_size)
        released = GaussianEvent(sample_rate=1.0, noise_multiplier=one.noise_multiplier, count=evaluations(study))
        metrics = (after("metrics", [released]), privacy.metrics_epsilon)
    bound, at = _lifetime(settings)
    lifetime = (epsilon([*(e.event() for e in charges), *planned], at), bound)
    pairs = [training, lifetime, *([metrics] if metrics else [])]
    return Plan(
        noise_multiplier=steps[0].noise_multiplier if steps else None,
        study=training,
        metrics=metrics,
        lifetime=lifetime,
        delta=delta,
        fits=all(cost <= budget * (1 + 1e-6) for cost, budget in pairs),
    )


def _entries(settings: SiteSettings) -> list[Entry]:
    """The ledger's rows; none where nothing was ever charged. Looking makes no ledger."""
    anchors = settings.ledger.with_name(settings.ledger.name + ".anchors")
    there = settings.ledger.exists() or anchors.exists()
    rows = Ledger(settings.ledger, settings.name).entries() if there else []
    check_witness(settings, rows)
    return rows


def _lifetime(settings: SiteSettings) -> tuple[float, float]:
    """The hospital's budget and its δ."""
    if settings.lifetime is None:
        return math.inf, site_delta(0.0, settings.public_size)
    return settings.lifetime.epsilon, settings.lifetime.delta


def _line(dataset: str, what: str, charges: Sequence[Entry], settled: set[int], budget: float, delta: float) -> Line:
    return Line(
        dataset=dataset,
        what=what,
        settled=epsilon([entry.event() for entry in charges if entry.id in settled], delta),
        charged=epsilon([entry.event() for entry in charges], delta),
        budget=budget,
        delta=delta,
        charges=len(charges),
        open=sum(entry.id not in settled for entry in charges),
    )

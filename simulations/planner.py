# SPDX-License-Identifier: Apache-2.0
"""What a private study will cost and how much signal it leaves, before anything is spent.

For each training site, from the study and public cohort sizes alone:

    σ         noise multiplier that spends the study's ε, at the site's δ, over all its steps
    signal    n·q·C: the most that a step's clipped sum can be (n public training patients, all gradients aligned,
              each as long as the clip C); real gradients disagree, so this is an upper bound
    noise     σ·C·√d: expected norm of the noise on d trainable parameters
    per step  signal / noise, in which C cancels; over all steps it grows with √steps, for noise averages out

Mode ``local``: each hospital adds the whole noise to its own sum. Mode ``distributed``: one sum over all H hospitals;
each adds σ / √(H - t), where t is ``privacy.tolerate``, so the sum holds σ·√(H / (H - t)) when all answer, and σ serves
the strictest δ among them. Neighbouring relation: zero-out of one patient.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ..client.settings import SiteSettings
from ..models.networks import build_network
from ..models.trainable import choose_trainable
from ..privacy.accounting import COARSE_GRID, FINE_GRID, GaussianEvent, calibrate, epsilon
from ..privacy.budget import Budget, site_delta
from ..privacy.contract import Role
from ..privacy.errors import StudyError
from ..privacy.ledger import Ledger
from ..privacy.study import Study

__all__ = ["Change", "Plan", "SitePlan", "make_plan"]

MOST_POINTS = 24
"""Rounds at which the curve of a site is computed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SitePlan:
    """One training site.

    Attributes:
        name: the site.
        public_size: declared cohort size.
        patients: public number of training patients, n.
        delta: δ of the study here.
        sigma: noise multiplier that the promise needs in the sum that this site's patients enter.
        share: what this site adds itself, in units of C: σ, or its share of it.
        signal_to_noise: per step, as the module defines it; of the pooled sum in mode ``distributed``.
        curve: (round, ε of the study after it).
        lifetime: (round, ε of the data set over all studies); empty without a lifetime budget.
        before: ε of the data set that its ledger holds already, at the lifetime's δ.
        ends: the first round that a budget does not cover; None where all are covered.
        left: ε that the tightest budget still has after the last covered round.
    """

    name: str
    public_size: int
    patients: float
    delta: float
    sigma: float
    share: float
    signal_to_noise: float
    curve: Sequence[tuple[int, float]]
    lifetime: Sequence[tuple[int, float]]
    before: float
    ends: int | None
    left: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What one change of the study would do at the site with the least signal.

    Attributes:
        what: the change.
        kept: ε if σ stayed as planned; None where σ belongs to another sum.
        sigma: σ that spends the same ε.
        signal_to_noise: per step, with that σ.
        total: over all steps.
        work: gradients per patient, relative to the plan.
    """

    what: str
    kept: float | None
    sigma: float
    signal_to_noise: float
    total: float
    work: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The plan of a study.

    Attributes:
        study: the study.
        parameters: number of trainable parameters, d.
        sites: training sites by name.
        changes: the study as it is, then with one thing changed.
    """

    study: Study
    parameters: int
    sites: Sequence[SitePlan]
    changes: Sequence[Change]

    @property
    def first_to_end(self) -> SitePlan | None:
        """The site whose budget ends first, or None where every budget covers the whole study."""
        ending = [site for site in self.sites if site.ends is not None]
        return min(ending, key=lambda site: (site.ends or 0, site.name), default=None)


def make_plan(study: Study, settings: Mapping[str, SiteSettings]) -> Plan:
    """Plan ``study`` on sites; reads their ledgers, if there are any, and spends nothing.

    Raises:
        StudyError: the study promises no privacy, so there is nothing to plan, or no site trains.
        BadInput: no sensible noise reaches the study's ε.
        LedgerDistrusted: a site's ledger was changed.
    """
    if study.privacy.mode == "none":
        raise StudyError('privacy.mode = "none" spends no ε: plan it with --set privacy.mode=local')
    training = {name: one for name, one in sorted(settings.items()) if one.role is Role.TRAIN}
    if not training:
        raise StudyError("no site is left to train: evaluation.heldout names all of them")
    frame = _Frame(study, training)
    sites = [frame.site(name) for name in training]
    worst = min(sites, key=lambda site: (site.signal_to_noise, site.name))
    return Plan(study=study, parameters=frame.parameters, sites=sites, changes=list(frame.changes(worst)))


class _Frame:
    """What all sites of a plan share."""

    def __init__(self, study: Study, settings: Mapping[str, SiteSettings]) -> None:
        self.study = study
        self.settings = settings
        self.sites = len(settings)
        self.tolerate = study.privacy.tolerate
        if study.privacy.mode == "distributed" and (self.sites < 2 or 3 * self.tolerate >= self.sites):
            raise StudyError(
                f'privacy.mode = "distributed" with {self.sites} training sites and tolerate = {self.tolerate}: '
                "it takes two sites or more, of which fewer than a third are tolerated"
            )
        network = build_network(
            study.model, in_channels=len(study.data.modalities), out_channels=study.task.channels, seed=study.study.seed
        )
        trained = set(choose_trainable(network, study.training.trainable))
        self.parameters = sum(p.numel() for name, p in network.named_parameters() if name in trained)

    def patients(self, name: str) -> float:
        """Public number of training patients of a site."""
        return self.settings[name].public_size * (1 - self.study.evaluation.validation_fraction)

    def delta(self, name: str) -> float:
        """δ of the study at a site."""
        return site_delta(self.study.privacy.delta, self.settings[name].public_size)

    def sigma(self, name: str, mode: str, rate: float, steps: int) -> float:
        """Noise multiplier of the sum that a site's patients enter."""
        delta = min(map(self.delta, self.settings)) if mode == "distributed" else self.delta(name)
        return calibrate(self.study.privacy.epsilon, delta, rate, steps)

    def signal_to_noise(self, name: str, mode: str, rate: float, sigma: float) -> float:
        """Of one step, with the noise that the sum really holds."""
        patients = self.patients(name)
        if mode == "distributed":
            patients, sigma = sum(map(self.patients, self.settings)), self.share(mode, sigma) * math.sqrt(self.sites)
        return patients * rate / (sigma * math.sqrt(self.parameters))

    def share(self, mode: str, sigma: float) -> float:
        """Noise that one site adds, in units of C."""
        return sigma / math.sqrt(self.sites - self.tolerate) if mode == "distributed" else sigma

    def site(self, name: str) -> SitePlan:
        """The plan of one site."""
        study, settings, privacy = self.study, self.settings[name], self.study.privacy
        per_round = study.total_steps // study.training.rounds
        sigma = self.sigma(name, privacy.mode, privacy.sample_rate, study.total_steps)
        own, all_studies = _spent(settings, study)
        budgets = [(own, Budget(epsilon=privacy.epsilon, delta=self.delta(name)))]
        if settings.lifetime is not None:
            budgets.append((all_studies, settings.lifetime))

        def after(number: int, spent: Sequence[GaussianEvent], delta: float, grid: float = COARSE_GRID) -> float:
            steps = number * per_round
            new = [GaussianEvent(sample_rate=privacy.sample_rate, noise_multiplier=sigma, count=steps)] if steps else []
            return epsilon([*spent, *new], delta, grid=grid)

        def within(number: int, spent: Sequence[GaussianEvent], budget: Budget) -> bool:
            """As the ledger decides: the coarse value if it fits, the fine one where that could change the answer."""
            bound, found = budget.epsilon * (1 + 1e-6), after(number, spent, budget.delta)
            if bound < found < 1.01 * bound:
                found = after(number, spent, budget.delta, FINE_GRID)
            return found <= bound

        def covered(number: int) -> bool:
            return all(within(number, spent, budget) for spent, budget in budgets)

        rounds = study.training.rounds
        ends = None if covered(rounds) else _first(lambda number: not covered(number), rounds)
        last = rounds if ends is None else ends - 1
        marks = _marks(rounds)
        return SitePlan(
            name=name,
            public_size=settings.public_size,
            patients=self.patients(name),
            delta=self.delta(name),
            sigma=sigma,
            share=self.share(privacy.mode, sigma),
            signal_to_noise=self.signal_to_noise(name, privacy.mode, privacy.sample_rate, sigma),
            curve=[(number, after(number, own, self.delta(name))) for number in marks],
            lifetime=[
                (number, after(number, all_studies, settings.lifetime.delta)) for number in marks if settings.lifetime
            ],
            before=after(0, all_studies, budgets[-1][1].delta),
            ends=ends,
            left=max(0.0, min(budget.epsilon - after(last, spent, budget.delta) for spent, budget in budgets)),
        )

    def changes(self, worst: SitePlan) -> Iterator[Change]:
        """The plan, and the plan with one thing changed, at the site with the least signal."""
        privacy, steps = self.study.privacy, self.study.total_steps
        rate, crops, rounds = privacy.sample_rate, privacy.crops_per_patient, self.study.training.rounds
        other = "local" if privacy.mode == "distributed" else "distributed"

        def change(what: str, mode: str = privacy.mode, q: float = rate, count: int = steps, k: int = crops) -> Change:
            kept = None
            if mode == privacy.mode:
                event = GaussianEvent(sample_rate=q, noise_multiplier=worst.sigma, count=count)
                kept = epsilon([event], worst.delta, grid=COARSE_GRID)
            sigma = self.sigma(worst.name, mode, q, count)
            ratio = self.signal_to_noise(worst.name, mode, q, sigma)
            return Change(
                what=what, kept=kept, sigma=sigma, signal_to_noise=ratio, total=ratio * math.sqrt(count),
                work=q * count * k / (rate * steps * crops),
            )  # fmt: skip

        yield change("as planned")
        for factor in (0.5, 2.0):
            number = max(1, round(rounds * factor))
            if number != rounds:
                yield change(f"{number} rounds", count=steps // rounds * number)
        for q in (rate / 2, min(1.0, rate * 2)):
            if q != rate:
                yield change(f"sample rate {q:g}", q=q)
        for k in sorted({1, max(1, crops // 2), crops * 2} - {crops}):
            yield change(f"{k} crop{'s' * (k > 1)} per patient", k=k)
        if self.sites > 1 and 3 * self.tolerate < self.sites:
            yield change(f"mode {other}", mode=other)


def _spent(settings: SiteSettings, study: Study) -> tuple[list[GaussianEvent], list[GaussianEvent]]:
    """Charges of this study's training and of all studies that the site's ledger holds."""
    if not settings.ledger.is_file():
        return [], []
    charges = [
        entry
        for entry in Ledger(settings.ledger, settings.name).entries()
        if entry.kind == "reserve" and entry.dataset == settings.dataset_id
    ]
    own = [entry.event() for entry in charges if entry.study == study.hash and entry.purpose == "train"]
    return own, [entry.event() for entry in charges]


def _first(holds: Callable[[int], bool], highest: int) -> int:
    """The least number from 1 to ``highest`` for which ``holds``, which never turns false again."""
    low, high = 1, highest
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return low


def _marks(rounds: int) -> list[int]:
    """At most :data:`MOST_POINTS` rounds, the first and the last among them."""
    count = min(rounds, MOST_POINTS)
    return sorted({1 + round(k * (rounds - 1) / max(1, count - 1)) for k in range(count)})

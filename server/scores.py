# SPDX-License-Identifier: Apache-2.0
"""A score as every view of a run says it: value, 95 % interval, and what it cost a patient in privacy.

Report, model card, dashboard, ``runs``, ``watch`` and ``release`` take their words from here, so that no score stands
without the two. Held-out hospitals come first.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from ..privacy.budget import site_delta
from ..privacy.contract import Role
from ..privacy.study import Study
from .report_words import Json, epsilon_text, interval_text, main_metric, metric_name, number
from .run_view import RunView, SiteView

__all__ = ["Score", "final_scores", "headline", "heldout_scores", "price", "price_per_unit", "score_of", "spent_so_far"]

NOTHING: Final = "nothing spent"
UNIT: Final = "patient"


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """A metric at a hospital, in words.

    Attributes:
        site: the hospital.
        metric: its name, such as "Dice".
        value: such as "0.61".
        interval: 95 %, such as "0.55–0.67"; empty where it was not saved (runs of older versions).
        price: ε and δ with their unit, such as "ε ≤ 7.98, δ = 0.001 per patient".
    """

    site: str
    metric: str
    value: str
    interval: str
    price: str

    def __str__(self) -> str:
        """In one line."""
        interval = f" ({self.interval})" if self.interval else ""
        return f"{self.site} {self.metric} {self.value}{interval}, {self.price}"


def price(privacy: Json, name: str, *, heldout: bool) -> str:
    """What a score cost in privacy: the hospital's own ε, or for a held-out one the largest of the training hospitals.

    Args:
        privacy: as in ``results.json``.
        name: of the hospital.
        heldout: it never trains, so its score owes to every training hospital: the weakest of their promises.
    """
    if privacy["mode"] == "none":
        return "none"
    spent = privacy["epsilon"]
    cost = max(spent.values(), default=None) if heldout else spent.get(name)
    if cost is None:
        return NOTHING
    deltas: Mapping[str, float] = privacy.get("delta_by_site", {})
    if heldout:
        return f"ε ≤ {epsilon_text(cost)}, δ {'≤' if len(set(deltas.values())) > 1 else '='} {privacy['delta']:g}"
    return f"ε = {epsilon_text(cost)}, δ = {deltas.get(name, privacy['delta']):g}"


def price_per_unit(privacy: Json, name: str, *, heldout: bool) -> str:
    """:func:`price` with the unit that the promise is for."""
    if privacy["mode"] == "none":
        return "no privacy promise"
    found = price(privacy, name, heldout=heldout)
    return found if found == NOTHING else f"{found} per {privacy['unit']}"


def spent_so_far(sites: Mapping[str, SiteView], study: Study) -> Json:
    """The privacy of a run under way, in the form of ``results.json``: each hospital's last ε, at its own δ."""
    delta = study.privacy.delta
    deltas = {
        name: site_delta(delta, site.public_size)
        for name, site in sites.items()
        if site.role == Role.TRAIN.value and site.public_size
    }
    return {
        "mode": study.privacy.mode,
        "unit": UNIT,
        "epsilon": {name: site.epsilon for name, site in sites.items() if site.epsilon is not None},
        "delta": max(deltas.values(), default=delta),
        "delta_by_site": deltas,
    }


def headline(view: RunView, study: Study | None) -> str:
    """The metric that a run is judged by: the one that selects, the study's next, or any that a hospital told."""
    told = list(dict.fromkeys(name for site in view.sites.values() for name in site.metrics))
    wanted = [study.select_metric, *study.metric_names] if study else []
    return next((name for name in [*wanted, *told] if name in told), "")


def score_of(site: SiteView, key: str, privacy: Json | None) -> Score | None:
    """One metric of a hospital; None where it told none. ``privacy``: of :func:`spent_so_far`, None where not known."""
    if key not in site.metrics:
        return None
    interval = {"ci95": site.intervals[key]} if key in site.intervals else None
    return Score(
        site=site.name,
        metric=metric_name(key),
        value=number(key, site.metrics[key]),
        interval=interval_text(key, interval) if interval else "",
        price=price_per_unit(privacy, site.name, heldout=site.role == Role.HELDOUT.value) if privacy else "",
    )


def heldout_scores(view: RunView, study: Study | None) -> list[Score]:
    """The headline of each hospital that never trains, by name."""
    if study is None:
        return []
    key, privacy = headline(view, study), spent_so_far(view.sites, study)
    sites = sorted((s for s in view.sites.values() if s.role == Role.HELDOUT.value), key=lambda site: site.name)
    return [score for site in sites if (score := score_of(site, key, privacy))]


def final_scores(results: Json) -> list[Score]:
    """The headline of each held-out hospital in ``results.json``; those that told it."""
    key, privacy = main_metric(results), results["privacy"]
    return [
        Score(
            site=name,
            metric=metric_name(key),
            value=number(key, site["metrics"][key]["mean"]),
            interval=interval_text(key, site["metrics"][key]),
            price=price_per_unit(privacy, name, heldout=True),
        )
        for name, site in sorted(results["sites"].items())
        if site["role"] == Role.HELDOUT.value and key in site["metrics"]
    ]

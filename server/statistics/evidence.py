# SPDX-License-Identifier: Apache-2.0
"""Everything that is said of several models on the same patients, as JSON values that the report lays out.

A model is judged only on patients that it did not train on; two models are compared only on patients that both were
judged on. Where a study was repeated with other seeds, a patient's value is the mean over the seeds, and the spread of
the seeds is told beside the interval over patients, never mixed into it. AUROC and concordance, which no single patient
has, are in :mod:`.ranked_rows`.

Families of tests (Holm): one per table, ``sites`` (each model at each site) and ``overall`` (each model over all sites,
patients resampled within sites); in each the tests of a difference are one family, those of "not worse" another. The
headline metric is tested, and AUROC or concordance where they are known.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean, stdev
from typing import Any, Final

from ...models.metrics.means import Interval, Method, mean_interval
from .equivalence import equivalence
from .family import holm
from .intervals import estimate_json
from .moments import moments_interval, site_moments
from .paired import compare_paired, power_note
from .ranked_rows import Ranked, RankedRows
from .seeds import Patients, Table, known, mean_over_seeds, seed_rows
from .strata import Traits, strata_rows

__all__ = ["ALL", "BEST_LOCAL", "EVIDENCE_VERSION", "INSIDE", "OURS", "OWN", "Judged", "Table", "build_evidence"]

EVIDENCE_VERSION: Final = 1

OURS: Final = "federated"
"""The model that the study is about."""
INSIDE: Final = "federated, site trained"
"""Values of our model at a site that took part in its training, where it was also judged without it."""
TUNED: Final = "fine-tuned"
"""At each site, our model after more training there."""
OWN: Final = "local, own"
"""At each site, the model of that very hospital alone."""
BEST_LOCAL: Final = "local, best"
"""At each site, the best of the other hospitals' own models, chosen with hindsight on these very patients."""
ALL: Final = "*"
"""In place of a site: all sites, patients resampled within them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """What is known of models on patients.

    Args:
        metrics: metric: one table per seed.
        titles: model: name in tables; the order is that of the report. :data:`OURS` must be among them.
        sites: names, in the order of the report.
        main: metric of the headline.
        better: metric: whether more is better.
        traits: site: patient: trait: value, such as ``{"sex": "F"}``; for strata.
        heldout: sites at which our model did not train; for the gap.
        notes: what a reader must know, such as patients that could not be read.
        ranked: metric of ranking: one table per seed.
        bounds: metric: least and greatest value of a patient, of those that have both.
        method: of intervals of means; None: what suits the metric. Differences have BCa, or ``percentile``.
    """

    metrics: Mapping[str, Sequence[Table]]
    titles: Mapping[str, str]
    sites: Sequence[str]
    main: str
    better: Mapping[str, bool]
    traits: Traits = field(default_factory=dict)
    heldout: Sequence[str] = ()
    notes: Sequence[str] = ()
    ranked: Mapping[str, Sequence[Ranked]] = field(default_factory=dict)
    bounds: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    method: Method | None = None


def build_evidence(judged: Judged, *, seed: int, resamples: int = 2000, margin: float = 0.02) -> dict[str, Any]:
    """Scores with intervals, comparisons, site matrix, gap, disparity, strata and the spread of seeds.

    Args:
        judged: the values.
        seed: of the resampling; the same seed gives the same evidence.
        resamples: at least 100.
        margin: of "not worse than", in the headline metric's unit; chosen before results are seen.
    """
    tables = {metric: mean_over_seeds(by_seed) for metric, by_seed in judged.metrics.items()}
    main = tables.get(judged.main, {})
    maker = _Maker(judged, seed, resamples, margin)
    with_best = _with_chosen(main, judged)
    ranked = [
        RankedRows(metric, by_seed, judged.titles, judged.sites, margin, federated=OURS, inside=INSIDE, everywhere=ALL)
        for metric, by_seed in judged.ranked.items()
    ]
    headline = next((rows for rows in ranked if rows.metric == judged.main), None)
    found = _evidence(judged, maker, tables, main, with_best, ranked)
    if headline:
        found |= {
            "matrix": headline.matrix(TUNED), "gap": headline.gap(judged.heldout), "disparity": headline.disparity(),
            "seeds": headline.seeds(), "strata": [],
        }  # fmt: skip
    return found


def _evidence(
    judged: Judged,
    maker: "_Maker",
    tables: Mapping[str, Table],
    main: Table,
    with_best: Table,
    ranked: Sequence[RankedRows],
) -> dict[str, Any]:
    return {
        "schema_version": EVIDENCE_VERSION,
        "metric": judged.main,
        "higher_is_better": judged.better.get(judged.main, True),
        "resamples": maker.resamples,
        "margin": maker.margin,
        "models": dict(judged.titles) | {BEST_LOCAL: "best other hospital's own", OWN: "this hospital's own"},
        "sites": list(judged.sites),
        "heldout": list(judged.heldout),
        "scores": [
            *(row for metric, table in tables.items() for row in maker.scores(metric, table)),
            *(row for rows in ranked for row in rows.scores()),
        ],
        "comparisons": adjusted(
            [*maker.comparisons(with_best), *(row for rows in ranked for row in rows.comparisons())]
        ),
        "matrix": maker.matrix(main),
        "gap": maker.gap(main),
        "disparity": maker.disparity(main),
        "strata": strata_rows(main.get(OURS, {}), judged.traits, interval=maker.of_values),
        "seeds": seed_rows(judged.metrics.get(judged.main, ()), judged.titles, judged.sites),
        "notes": [*judged.notes, *maker.notes, *(note for rows in ranked for note in rows.notes)],
    }


def adjusted(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The comparisons with p-values by Holm within each family, and the number of its tests."""
    for family in ("sites", "overall"):
        inside = [row for row in rows if row["family"] == family]
        members = {k: row["p"] for k, row in enumerate(inside) if row["p"] is not None}
        for k, value in holm(members).items():
            inside[k] |= {"p_holm": value, "tests": len(members)}
        not_worse = {k: (row.get("equivalence") or {}).get("p_not_worse") for k, row in enumerate(inside)}
        for k, value in holm({k: p for k, p in not_worse.items() if p is not None}).items():
            inside[k]["equivalence"]["p_not_worse_holm"] = value
    return rows


@dataclass(slots=True)
class _Maker:
    judged: Judged
    seed: int
    resamples: int
    margin: float
    notes: list[str] = field(default_factory=list)

    def of_values(self, strata: Sequence[Sequence[float | None]], metric: str = "") -> Interval:
        """The mean of a metric (the headline's) with its interval."""
        bounds, method = self.judged.bounds.get(metric or self.judged.main), self.judged.method
        return mean_interval(strata, seed=self.seed, resamples=self.resamples, method=method, bounds=bounds)

    def interval(
        self, strata: Sequence[Sequence[float | None]], metric: str = "", *, difference: bool = False
    ) -> dict[str, Any] | None:
        """An estimate as it stands in results; None without a finite value."""
        total = sum(map(len, strata))
        if not any(known(value) for values in strata for value in values):
            return {"mean": None, "ci95": None, "n": 0, "failed": total} if total else None
        if difference:
            return estimate_json(
                mean_interval(strata, seed=self.seed, resamples=self.resamples, method=self.judged.method)
            )
        return estimate_json(self.of_values(strata, metric))

    def scores(self, metric: str, table: Table) -> list[dict[str, Any]]:
        """Each model at each site, on all patients that it was judged on there."""
        rows = []
        for model in self.judged.titles:
            sites = table.get(model, {})
            scopes = {site: [list(sites[site].values())] for site in self.judged.sites if sites.get(site)}
            if len(scopes) > 1:
                scopes |= {ALL: [values for (values,) in scopes.values()]}
            for site, strata in scopes.items():
                found = self.interval(strata, metric)
                if found:
                    rows.append({"model": model, "metric": metric, "site": site, **found})
                    self._note_odd(model, metric, site, found, strata)
        return rows

    def _note_odd(
        self, model: str, metric: str, site: str, found: Mapping[str, Any], strata: Sequence[Sequence[float | None]]
    ) -> None:
        where, title = f"at {site}", self.judged.titles[model]
        if site == ALL or metric != self.judged.main:
            return
        if found["failed"]:
            self.notes.append(
                f"{title} {where}: {metric} of {found['failed']} of {found['n'] + found['failed']} patients is not a "
                "finite number; they have no part in the mean"
            )
        distinct = {value for values in strata for value in values if known(value)}
        if found["ci95"] is None and found["n"]:
            patients = "one patient" if found["n"] == 1 else f"{found['n']} patients"
            self.notes.append(f"{title} {where}: {patients}, so {metric} has no interval and no test")
        elif len(distinct) == 1 and found["n"] > 1 and model == OURS:
            self.notes.append(f"{title} {where}: {metric} is {found['mean']:g} for each of {found['n']} patients")

    def comparisons(self, table: Table) -> list[dict[str, Any]]:
        """Our model against each other one, at each site and over all, on the patients that both were judged on."""
        ours = table.get(OURS, {})
        rows: list[dict[str, Any]] = []
        for model in [*self.judged.titles, BEST_LOCAL, OWN]:
            if model in (OURS, INSIDE) or model not in table:
                continue
            shared = {
                site: _shared(ours[site], table[model][site])
                for site in self.judged.sites
                if site in ours and site in table[model]
            }
            shared = {site: pairs for site, pairs in shared.items() if pairs}
            if model not in (BEST_LOCAL, OWN):  # these are the same tests as the models that they stand for
                rows += [self._comparison(model, site, {site: pairs}) for site, pairs in shared.items()]
            elsewhere = {site: pairs for site, pairs in shared.items() if model != f"local: {site}"}
            if len(elsewhere) > 1 or (elsewhere and model in (BEST_LOCAL, OWN)):
                rows.append(self._comparison(model, ALL, elsewhere))
        return rows

    def _comparison(self, model: str, site: str, pairs: Mapping[str, Mapping[str, tuple[Any, Any]]]) -> dict[str, Any]:
        sign = 1.0 if self.judged.better.get(self.judged.main, True) else -1.0
        strata = [[_minus(a, b) for a, b in patients.values()] for patients in pairs.values()]
        row: dict[str, Any] = {
            "model": model, "site": site, "metric": self.judged.main, "family": "overall" if site == ALL else "sites",
            "ours": self.interval([[a for a, _ in patients.values()] for patients in pairs.values()]),
            "theirs": self.interval([[b for _, b in patients.values()] for patients in pairs.values()]),
            "p": None, "p_holm": None, "tests": 0,
        }  # fmt: skip
        if not any(known(value) for values in strata for value in values):
            return row | {"difference": None, "note": "no patient has a finite value from both models"}
        found = compare_paired(strata, seed=self.seed, resamples=self.resamples, method=self.judged.method)
        moments = [m for m in (site_moments([_times(sign, v) for v in values]) for values in strata) if m]
        return row | {
            "difference": estimate_json(found.difference),
            "student": estimate_json(moments_interval([m for m in map(site_moments, strata) if m])),
            "median": found.median,
            "p": found.p_wilcoxon,
            "p_bootstrap": found.p_bootstrap,
            # The sign is that of "ours is better", whatever the metric.
            "effect": {
                "value": sign * found.effect,
                "ci95": _ends(found.effect_low, found.effect_high, sign),
            },
            "equivalence": asdict(equivalence(moments, margin=self.margin)) if found.p_wilcoxon is not None else None,
            "note": found.note or power_note(found.difference),
        }

    def matrix(self, table: Table) -> dict[str, Any]:
        """Models by sites.

        A column is judged on the patients that all its models share. Models that trained at the column's own hospital
        (its own one, and the fine-tuned one) have its validation patients only; their cells say how many.
        """
        rows = [model for model in self.judged.titles if model != INSIDE and table.get(model)]
        cells: dict[str, dict[str, Any]] = {model: {} for model in rows}
        for site in self.judged.sites:
            others = [set(table[m][site]) for m in rows if site in table[m] and m not in (f"local: {site}", TUNED)]
            common = set.intersection(*others) if others else set()
            for model in rows:
                patients = table[model].get(site, {})
                kept = [value for patient, value in sorted(patients.items()) if patient in common or not others]
                if kept:
                    cells[model][site] = self.interval([kept])
        return {"rows": rows, "columns": list(self.judged.sites), "cells": cells}

    def gap(self, table: Table) -> list[dict[str, Any]]:
        """What the model loses at hospitals that it never saw."""
        ours, inside = table.get(OURS, {}), table.get(INSIDE, {})
        rows: list[dict[str, Any]] = []
        if inside:
            pairs = {s: _shared(ours.get(s, {}), inside[s]) for s in self.judged.sites if s in inside}
            pairs = {site: found for site, found in pairs.items() if found}
            scopes = {site: {site: found} for site, found in pairs.items()} | ({ALL: pairs} if len(pairs) > 1 else {})
            for site, members in scopes.items():
                strata = [[_minus(a, b) for a, b in found.values()] for found in members.values()]
                rows.append(
                    {
                        "site": site, "paired": True,
                        "inside": self.interval([[b for _, b in found.values()] for found in members.values()]),
                        "outside": self.interval([[a for a, _ in found.values()] for found in members.values()]),
                        "difference": self.interval(strata, difference=True),
                    }
                )  # fmt: skip
            return rows
        outside = [list(ours[site].values()) for site in self.judged.heldout if ours.get(site)]
        within = [list(v.values()) for site, v in ours.items() if site not in self.judged.heldout and v]
        if outside and within:
            rows.append(
                {
                    "site": ALL, "paired": False, "inside": self.interval(within), "outside": self.interval(outside),
                    "difference": _unpaired(outside, within),
                }
            )  # fmt: skip
        return rows

    def disparity(self, table: Table) -> list[dict[str, Any]]:
        """Worst site, largest difference and standard deviation over sites, for each model with several."""
        more = self.judged.better.get(self.judged.main, True)
        rows = []
        for model in self.judged.titles:
            finite = {s: [v for v in p.values() if known(v)] for s, p in table.get(model, {}).items()}
            means = {site: fmean(v for v in values if v is not None) for site, values in finite.items() if values}
            if model == INSIDE or len(means) < 2:
                continue
            worst = (min if more else max)(means, key=lambda site: means[site])
            spread = max(means.values()) - min(means.values())
            rows.append(
                {"model": model, "worst": worst, "value": means[worst], "range": spread, "sd": stdev(means.values())}
            )
        return rows


def _with_chosen(table: Table, judged: Judged) -> Table:
    """The table with the hospital's own model and the best of the others as models of their own."""
    locals_ = [model for model in table if model.startswith("local: ")]
    more = judged.better.get(judged.main, True)
    best: dict[str, Patients] = {}
    own: dict[str, Patients] = {}
    for site in judged.sites:
        ours = table.get(OURS, {}).get(site, {})
        means: dict[str, float] = {}
        for model in locals_:
            if model == f"local: {site}":
                own |= {site: table[model][site]} if site in table[model] else {}
                continue
            values = [v for p, v in table[model].get(site, {}).items() if p in ours and v is not None and known(v)]
            means |= {model: fmean(values)} if values else {}
        if means:
            best[site] = table[(max if more else min)(means, key=lambda model: means[model])][site]
    return {**table, **({BEST_LOCAL: best} if best else {}), **({OWN: own} if own else {})}


def _unpaired(outside: Sequence[Sequence[float | None]], inside: Sequence[Sequence[float | None]]) -> dict[str, Any]:
    """Difference of two means over different patients, by Welch's interval through moments."""
    out = [m for m in map(site_moments, outside) if m]
    within = [m for m in map(site_moments, inside) if m]
    if not out or not within:
        return {"mean": None, "ci95": None, "n": 0, "failed": 0}
    first, second = moments_interval(out), moments_interval(within)
    mean = first.mean - second.mean
    ends = None
    if first.low is not None and first.high is not None and second.low is not None and second.high is not None:
        # Each half width is a quantile times a standard error: their root of squares is Welch's to good accuracy.
        half = math.hypot(first.high - first.mean, second.high - second.mean)
        ends = [mean - half, mean + half]
    return {"mean": mean, "ci95": ends, "n": first.n + second.n, "failed": 0, "method": "student"}


def _shared(a: Patients, b: Patients) -> dict[str, tuple[float | None, float | None]]:
    return {patient: (a[patient], b[patient]) for patient in sorted(set(a) & set(b))}


def _minus(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def _times(sign: float, value: float | None) -> float | None:
    return None if value is None else sign * value


def _ends(low: float | None, high: float | None, sign: float) -> list[float] | None:
    return None if low is None or high is None else sorted((sign * low, sign * high))

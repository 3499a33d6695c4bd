# SPDX-License-Identifier: Apache-2.0
"""What :mod:`.evidence` says of AUROC and concordance: the same tables as of metrics that single patients have."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import Any, Final

from .intervals import estimate_json
from .paired import power_note
from .ranked import (
    FEW,
    Ranking,
    auroc_ranking,
    compare_ranked,
    concordance_ranking,
    ranked_gap,
    ranked_interval,
)

__all__ = ["MEASURES", "Ranked", "RankedRows"]

_NAMES: Final = {"auroc": "AUROC", "c_index": "C-index"}

Ranked = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""Model: site: patient: what :func:`.auroc_ranking` or :func:`.concordance_ranking` take of one."""

MEASURES: Final[Mapping[str, Callable[[Mapping[str, Any]], Ranking | None]]] = {
    "auroc": auroc_ranking,
    "c_index": concordance_ranking,
}


@dataclass(slots=True)
class RankedRows:
    """Rows of one metric.

    Args:
        metric: of :data:`MEASURES`.
        by_seed: one table per seed.
        titles: model: name, in the report's order.
        sites: in the report's order.
        margin: of "not worse than".
        federated: our model's key.
        inside: key of our model where the site trained.
        everywhere: in place of a site.
    """

    metric: str
    by_seed: Sequence[Ranked]
    titles: Mapping[str, str]
    sites: Sequence[str]
    margin: float
    federated: str
    inside: str
    everywhere: str
    notes: list[str] = field(default_factory=list)

    def scores(self) -> list[dict[str, Any]]:
        """Each model at each site, and over those where it is known."""
        rows = []
        for model in self.titles:
            known = {site: seeds for site in self.sites if (seeds := self._rankings(model, site))}
            for site, seeds in known.items():
                rows.append(self._row(model, site, [seeds]))
                if model == self.federated and (fewest := min(r.fewest for r in seeds)) < FEW:
                    few = "" if fewest == 1 else "s"
                    what = f"event{few}" if self.metric == "c_index" else f"patient{few} of a class"
                    self.notes.append(f"{self.titles[model]} at {site}: {_NAMES[self.metric]} rests on {fewest} {what}")
            if len(known) > 1:
                rows.append(self._row(model, self.everywhere, list(known.values())))
            if model == self.federated and (
                lacking := [s for s in self.sites if self._seen(model, s) and s not in known]
            ):
                why = "no pair to rank" if self.metric == "c_index" else "one class only, or a value is not finite"
                self.notes.append(
                    f"{self.titles[model]}: {_NAMES[self.metric]} is undefined at {', '.join(lacking)} ({why})"
                )
        return rows

    def comparisons(self) -> list[dict[str, Any]]:
        """Our model against each other one on the patients of both, with DeLong's test; not yet adjusted."""
        rows = []
        for model in self.titles:
            if model in (self.federated, self.inside):
                continue
            pairs = {}
            for site in self.sites:
                shared = self._seen(self.federated, site) & self._seen(model, site)
                ours, theirs = (self._rankings(m, site, shared) for m in (self.federated, model))
                if ours and theirs:
                    pairs[site] = (ours, theirs)
            rows += [self._comparison(model, site, [pair]) for site, pair in pairs.items()]
            elsewhere = [p for site, p in pairs.items() if model != f"local: {site}" and p[0][0].fewest > 1]
            if len(elsewhere) > 1:
                rows.append(self._comparison(model, self.everywhere, elsewhere))
        return rows

    def matrix(self, tuned: str) -> dict[str, Any]:
        """Models by sites, on the patients that all models of a column share; ``tuned`` is judged on its own."""
        rows = [m for m in self.titles if m != self.inside and any(self._seen(m, site) for site in self.sites)]
        cells: dict[str, dict[str, Any]] = {model: {} for model in rows}
        for site in self.sites:
            others = [self._seen(m, site) for m in rows if self._seen(m, site) and m not in (f"local: {site}", tuned)]
            common = set.intersection(*others) if others else None
            for model in rows:
                if seeds := self._rankings(model, site, common):
                    cells[model][site] = estimate_json(ranked_interval([seeds]))
        return {"rows": rows, "columns": list(self.sites), "cells": cells}

    def gap(self, heldout: Sequence[str]) -> list[dict[str, Any]]:
        """What our model loses at sites that it never saw."""
        shared = {s: self._seen(self.federated, s) & self._seen(self.inside, s) for s in self.sites}
        pairs = {
            site: (theirs, own)
            for site, patients in shared.items()
            if (theirs := self._rankings(self.federated, site, patients))
            and (own := self._rankings(self.inside, site, patients))
        }
        scopes = {site: [pair] for site, pair in pairs.items()}
        if len(pairs) > 1:
            scopes[self.everywhere] = list(pairs.values())
        rows = []
        for site, members in scopes.items():
            outside, inside = [o for o, _ in members], [i for _, i in members]
            difference = compare_ranked(outside, inside, margin=self.margin).difference
            rows.append(self._gap_row(site, True, outside, inside, estimate_json(difference)))
        if not rows:
            known = {s: seeds for s in self.sites if (seeds := self._rankings(self.federated, s))}
            outside = [seeds for site, seeds in known.items() if site in heldout]
            inside = [seeds for site, seeds in known.items() if site not in heldout]
            if outside and inside:
                apart = ranked_gap(outside, inside)
                rows.append(self._gap_row(self.everywhere, False, outside, inside, estimate_json(apart)))
        return rows

    def disparity(self) -> list[dict[str, Any]]:
        """Worst site, largest difference and standard deviation over sites, for each model with several."""
        rows = []
        for model in self.titles:
            means = {s: fmean(r.value for r in seeds) for s in self.sites if (seeds := self._rankings(model, s))}
            if model == self.inside or len(means) < 2:
                continue
            worst = min(means, key=lambda site: means[site])
            spread, sd = max(means.values()) - means[worst], stdev(means.values())
            rows.append({"model": model, "worst": worst, "value": means[worst], "range": spread, "sd": sd})
        return rows

    def seeds(self) -> list[dict[str, Any]]:
        """Spread over seeds of each model at each site; empty with one seed."""
        rows = []
        for model in self.titles if len(self.by_seed) > 1 else ():
            for site in self.sites:
                values = [ranking.value for ranking in self._rankings(model, site)]
                if len(values) > 1:
                    rows.append(
                        {
                            "model": model, "site": site, "seeds": len(values), "mean": fmean(values),
                            "sd": stdev(values), "lowest": min(values), "highest": max(values),
                        }
                    )  # fmt: skip
        return rows

    def _seen(self, model: str, site: str) -> set[str]:
        """Patients that the model was judged on with every seed."""
        tables = [set(table.get(model, {}).get(site, {})) for table in self.by_seed]
        return set.intersection(*tables) if tables else set()

    def _rankings(self, model: str, site: str, patients: set[str] | None = None) -> list[Ranking]:
        """Of each seed; empty where it is undefined with one of them."""
        kept = self._seen(model, site) if patients is None else patients & self._seen(model, site)
        found = [
            MEASURES[self.metric]({p: table[model][site][p] for p in sorted(kept)}) if kept else None
            for table in self.by_seed
        ]
        known = [ranking for ranking in found if ranking is not None]
        return known if len(known) == len(found) else []

    def _row(self, model: str, site: str, hospitals: Sequence[Sequence[Ranking]]) -> dict[str, Any]:
        return {"model": model, "metric": self.metric, "site": site, **estimate_json(ranked_interval(hospitals))}

    def _comparison(
        self, model: str, site: str, pairs: Sequence[tuple[Sequence[Ranking], Sequence[Ranking]]]
    ) -> dict[str, Any]:
        ours, theirs = [own for own, _ in pairs], [other for _, other in pairs]
        found = compare_ranked(ours, theirs, margin=self.margin)
        return {
            "model": model, "site": site, "metric": self.metric,
            "family": "overall" if site == self.everywhere else "sites",
            "ours": estimate_json(ranked_interval(ours)), "theirs": estimate_json(ranked_interval(theirs)),
            "p": found.p, "p_holm": None, "tests": 0, "test": "DeLong" if self.metric == "auroc" else "jackknife",
            "difference": estimate_json(found.difference), "effect": None,
            "equivalence": {"p_not_worse": found.p_not_worse},
            "note": "; ".join(filter(None, (found.note, power_note(found.difference) if found.p is not None else ""))),
        }  # fmt: skip

    def _gap_row(
        self,
        site: str,
        paired: bool,
        outside: Sequence[Sequence[Ranking]],
        inside: Sequence[Sequence[Ranking]],
        difference: dict[str, Any],
    ) -> dict[str, Any]:
        return {
            "site": site, "paired": paired, "inside": estimate_json(ranked_interval(inside)),
            "outside": estimate_json(ranked_interval(outside)), "difference": difference,
        }  # fmt: skip

# SPDX-License-Identifier: Apache-2.0
"""DeLong's test and the jackknife of concordance against their definitions, and against resampled patients."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fedneuro.models.metrics import auroc, c_index
from fedneuro.models.metrics.outcome import pairs_apart
from fedneuro.server.report_evidence import evidence_view
from fedneuro.server.report_files import table_csv
from fedneuro.server.statistics.evidence import ALL, INSIDE, OURS, Judged, build_evidence
from fedneuro.server.statistics.ranked import (
    auroc_ranking,
    compare_ranked,
    concordance_ranking,
    ranked_interval,
)


def classified(random: np.random.Generator, n: int, skill: float, difficulty: Any) -> dict[str, Any]:
    """Patients of two classes, in turn; scores in steps of 0.05, so that there are ties."""
    targets = np.arange(n) % 3 == 0
    score = np.round(1 / (1 + np.exp(-skill * (2 * targets - 1) - difficulty - random.normal(0, 1, n))) * 20) / 20
    return {f"p{i:03d}": (int(targets[i]), (1 - score[i], score[i])) for i in range(n)}


def delong(a: dict[str, Any], b: dict[str, Any]) -> tuple[float, float]:
    """Difference of areas and its variance, as DeLong et al. (1988) write them, pair by pair."""
    positive = [p for p, (label, _) in a.items() if label]
    negative = [p for p, (label, _) in a.items() if not label]

    def psi(x: float, y: float) -> float:
        return 1.0 if y < x else 0.5 if y == x else 0.0

    v10, v01 = [], []
    for scores in (a, b):
        value = {p: scores[p][1][1] for p in scores}
        v10.append([np.mean([psi(value[i], value[j]) for j in negative]) for i in positive])
        v01.append([np.mean([psi(value[i], value[j]) for i in positive]) for j in negative])
    s = np.cov(v10) / len(positive) + np.cov(v01) / len(negative)
    return float(np.mean(v10[0]) - np.mean(v10[1])), float(s[0, 0] + s[1, 1] - 2 * s[0, 1])


@pytest.mark.parametrize("seed", range(5))
def test_midranks_give_delongs_components(seed: int) -> None:
    random = np.random.default_rng(seed)
    n = int(random.integers(8, 40))
    difficulty = random.normal(0, 1, n)
    a, b = (classified(random, n, skill, difficulty) for skill in (1.5, 0.8))
    difference, variance = delong(a, b)
    ours, theirs = auroc_ranking(a), auroc_ranking(b)
    assert ours and theirs
    found = compare_ranked([[ours]], [[theirs]], margin=0.02).difference
    assert found.mean == pytest.approx(difference, abs=1e-12)
    assert found.high is not None and found.high - found.mean == pytest.approx(1.959964 * variance**0.5, rel=1e-6)
    rows = np.array([p for _, p in a.values()])
    assert ours.value == pytest.approx(auroc(rows, np.array([label for label, _ in a.values()])))


def test_delong_agrees_with_resampled_patients() -> None:
    """Over two hospitals: the standard error is that of patients drawn anew within class and hospital."""
    random = np.random.default_rng(11)
    sites = [(classified(random, n, 1.2, d), classified(random, n, 0.7, d)) for n in (90, 60) for d in [np.zeros(n)]]
    ours, theirs = ([[r] for site in sites if (r := auroc_ranking(site[k]))] for k in (0, 1))
    found = compare_ranked(ours, theirs, margin=0.02)
    assert found.difference.high is not None
    error = (found.difference.high - found.difference.mean) / 1.959964
    draws = []
    for _ in range(400):
        total, weights = 0.0, 0.0
        for a, b in sites:
            by_class = [[p for p, (label, _) in a.items() if label == k] for k in (0, 1)]
            drawn = [p for group in by_class for p in random.choice(group, len(group))]
            targets = np.array([a[p][0] for p in drawn])
            areas = [auroc(np.array([scores[p][1] for p in drawn]), targets) or 0.0 for scores in (a, b)]
            pairs = len(by_class[0]) * len(by_class[1])
            total, weights = total + pairs * (areas[0] - areas[1]), weights + pairs
        draws.append(total / weights)
    assert error == pytest.approx(np.std(draws), rel=0.12)
    assert found.difference.mean == pytest.approx(np.mean(draws), abs=0.01)
    assert error * 0.6 != pytest.approx(np.std(draws), rel=0.12), "an unpaired or halved error would be noticed"


def test_delong_keeps_its_level_and_finds_what_is_there() -> None:
    """200 pairs of interchangeable models: about 5 % below 0.05; of unlike ones, most."""
    random = np.random.default_rng(5)

    def rate(skill: float) -> float:
        below = 0
        for _ in range(200):
            difficulty = random.normal(0, 1, 60)
            a, b = (auroc_ranking(classified(random, 60, s, difficulty)) for s in (skill, 0.6))
            assert a and b
            p = compare_ranked([[a]], [[b]], margin=0.02).p
            below += p is not None and p < 0.05
        return below / 200

    assert rate(0.6) < 0.095
    assert rate(1.6) > 0.5


def test_three_classes_are_the_mean_of_each_against_the_rest() -> None:
    random = np.random.default_rng(2)
    probabilities = random.dirichlet([1, 1, 1], 60)
    targets = np.arange(60) % 3
    found = auroc_ranking({f"{i:02d}": (int(targets[i]), probabilities[i]) for i in range(60)})
    assert found and found.value == pytest.approx(auroc(probabilities, targets))
    draws = []
    for _ in range(600):
        rows = np.concatenate([random.choice(np.flatnonzero(targets == k), 20) for k in range(3)])
        draws.append(auroc(probabilities[rows], targets[rows]) or 0.0)
    interval = ranked_interval([[found]])
    assert interval.low is not None and interval.high is not None
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * np.std(draws), rel=0.12)


def test_the_jackknife_of_concordance_agrees_with_resampled_patients() -> None:
    random = np.random.default_rng(3)
    time, event = random.exponential(10, 120), random.random(120) < 0.7
    models = [np.log(time) + random.normal(0, noise, 120) for noise in (0.8, 1.6)]
    rankings = [
        concordance_ranking({f"{i:03d}": (float(m[i]), float(time[i]), bool(event[i])) for i in range(120)})
        for m in models
    ]
    assert rankings[0] and rankings[1]
    assert [r.value for r in rankings if r] == pytest.approx([c_index(-m, time, event) for m in models])
    found = compare_ranked([[rankings[0]]], [[rankings[1]]], margin=0.02).difference
    assert found.high is not None
    draws = []
    for _ in range(400):
        rows = random.integers(0, 120, 120)
        a, b = (c_index(-m[rows], time[rows], event[rows]) or 0.0 for m in models)
        draws.append(a - b)
    assert (found.high - found.mean) / 1.959964 == pytest.approx(np.std(draws), rel=0.12)


def test_a_perfect_value_has_the_interval_that_its_pairs_apart_leave() -> None:
    """Six against seven, all in order: 0.025^(1/6) = 0.541. Twice that, equal weights: 0.025^(1/12) = 0.735."""
    found = auroc_ranking({f"p{k:02d}": (int(k < 6), (1.0 - (k < 6), float(k < 6))) for k in range(13)})
    assert found and found.apart == 6
    assert ranked_interval([[found]]).low == pytest.approx(0.541, abs=1e-3) and ranked_interval([[found]]).high == 1.0
    assert ranked_interval([[found], [found]]).low == pytest.approx(0.735, abs=1e-3)
    random = np.random.default_rng(0)
    for _ in range(20):
        time, event = random.exponential(1, 6), random.random(6) < 0.6
        assert pairs_apart(time, event) == _most_pairs(time, event)
    everyone = {f"p{k}": (float(k), float(k), k < 4) for k in range(8)}
    perfect = concordance_ranking(everyone)
    assert perfect and perfect.value == 1.0 and perfect.apart == 4


def _most_pairs(time: NDArray[np.float64], event: NDArray[np.bool_]) -> int:
    """By SciPy's matching: earlier is an event, later is anybody who outlived it; nobody twice."""
    from scipy.sparse import csr_matrix
    from scipy.sparse.csgraph import maximum_bipartite_matching

    best = 0
    places = np.arange(len(time))
    for mask in range(2 ** len(time)):  # who is the earlier one of a pair
        first = (mask >> places & 1).astype(bool)
        table = (time[None, :] > time[:, None]) & (event & first)[:, None] & ~first[None, :]
        if table.any():
            best = max(best, int((maximum_bipartite_matching(csr_matrix(table)) >= 0).sum()))
    return best


def test_where_nothing_can_be_tested_it_is_said() -> None:
    one = {"a": (1, (0.2, 0.8)), "b": (0, (0.6, 0.4)), "c": (0, (0.5, 0.5))}
    ranking = auroc_ranking(one)
    assert ranking and ranking.value == 1.0 and ranked_interval([[ranking]]).low == pytest.approx(0.025)
    found = compare_ranked([[ranking]], [[ranking]], margin=0.02)
    assert found.p is None and "one patient of a class" in found.note
    assert auroc_ranking({"a": (1, (0.2, 0.8))}) is None, "one class"
    assert auroc_ranking({**one, "d": (1, (float("nan"), 0.0))}) is None
    assert concordance_ranking({"a": (3.0, 4.0, False), "b": (1.0, 9.0, False)}) is None, "nobody had the event"
    alike = auroc_ranking({**one, "d": (1, (0.9, 0.1))})
    assert alike and compare_ranked([[alike]], [[alike]], margin=0.02).p == 1.0


def judged(metric: str, ranked: Any, **more: Any) -> dict[str, Any]:
    return build_evidence(
        Judged(
            metrics=more.pop("metrics", {}), titles={OURS: "federated", INSIDE: "inside", "pooled": "pooled training"},
            sites=["north", "south"], main=metric, better={metric: True},
            heldout=more.pop("sites_heldout", ["north", "south"]),
            ranked={metric: ranked}, **more,
        ),
        seed=0, resamples=100,
    )  # fmt: skip


def test_evidence_has_auroc_in_the_same_families_and_tables() -> None:
    random = np.random.default_rng(0)
    table: dict[str, Any] = {OURS: {}, "pooled": {}}
    accuracy: dict[str, Any] = {OURS: {}, "pooled": {}}
    for site in ("north", "south"):
        difficulty = random.normal(0, 1, 40)
        for model, skill in ((OURS, 2.0), ("pooled", 0.5)):
            table[model][site] = classified(random, 40, skill, difficulty)
            accuracy[model][site] = {p: float((s[1] > 0.5) == k) for p, (k, s) in table[model][site].items()}
    found = judged("auroc", [table], metrics={"accuracy": [accuracy]})
    assert {(row["metric"], row["site"]) for row in found["comparisons"]} == {
        ("auroc", "north"), ("auroc", "south"), ("auroc", ALL),
    }, "the headline alone is tested"  # fmt: skip
    both = build_evidence(
        Judged(
            metrics={"accuracy": [accuracy]}, titles={OURS: "federated", "pooled": "pooled training"},
            sites=["north", "south"], main="accuracy", better={"accuracy": True}, ranked={"auroc": [table]},
        ),
        seed=0, resamples=100,
    )  # fmt: skip
    families = {(row["metric"], row["site"]): row["tests"] for row in both["comparisons"]}
    assert families[("auroc", "north")] == families[("accuracy", "north")] == 4, "two sites, two metrics, one family"
    assert families[("auroc", ALL)] == families[("accuracy", ALL)] == 2
    view = evidence_view(found)
    assert view and view["metric"] == "AUROC" and view["matrix"] and view["disparity"]
    assert [card["site"] for card in view["cards"]] == ["north", "south"] and view["cards"][0]["rows"]
    assert view["overall"][0]["verdict"] == "federated is better"
    text = table_csv(both)
    assert "DeLong" in text and "Wilcoxon" in text


def test_few_of_a_class_and_one_class_are_noted() -> None:
    table = {OURS: {
        "north": {f"p{i}": (int(i < 3), (0.5, 0.5 + i / 100)) for i in range(12)},
        "south": {f"p{i}": (0, (0.5, 0.5)) for i in range(5)},
    }}  # fmt: skip
    notes = judged("auroc", [table])["notes"]
    assert any("AUROC rests on 3 patients of a class" in note for note in notes)
    assert any("AUROC is undefined at south" in note for note in notes)


def test_survival_is_compared_by_concordance_with_its_gap_and_matrix() -> None:
    random = np.random.default_rng(4)
    table: dict[str, Any] = {OURS: {}, INSIDE: {}, "pooled": {}}
    for site in ("north", "south"):
        time, event = random.exponential(12, 40), random.random(40) < 0.7
        for model, noise in ((OURS, 0.6), (INSIDE, 0.5), ("pooled", 3.0)):
            foreseen = np.log(time) + random.normal(0, noise, 40)
            kept = range(20) if model == INSIDE else range(40)
            table[model][site] = {f"p{i:02d}": (float(foreseen[i]), float(time[i]), bool(event[i])) for i in kept}
    found = judged("c_index", [table, table])
    better = next(row for row in found["comparisons"] if row["site"] == ALL)
    assert better["test"] == "jackknife" and better["p"] < 0.01 and better["difference"]["mean"] > 0.1
    assert {row["site"]: row["difference"]["n"] for row in found["gap"]} == {"north": 20, "south": 20, ALL: 40}
    assert found["gap"][0]["paired"] and found["matrix"]["rows"] == [OURS, "pooled"]
    assert {row["model"] for row in found["disparity"]} == {OURS, "pooled"} and found["seeds"][0]["sd"] == 0
    view = evidence_view(found)
    assert view and view["metric"] == "C-index" and len(view["cards"]) == 2
    apart = judged("c_index", [{OURS: table[OURS]}], sites_heldout=["south"])
    assert not apart["gap"][0]["paired"] and apart["gap"][0]["difference"]["n"] == 80

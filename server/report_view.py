# SPDX-License-Identifier: Apache-2.0
"""From ``results.json`` to what the report page says: words, tables and charts, without layout.

Held-out hospitals come first everywhere, and no score stands without what was paid for it (ε) and what it is
compared with. What is missing is said, never left out.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from ..privacy.errors import Reason
from .report_charts import AXES, dot_shapes, dots_chart, metric_curve, train_curve
from .report_checklists import checklists
from .report_evidence import estimate_text, evidence_view
from .report_groups import calibration, failures, groups
from .report_start import start_of, start_title, verdicts
from .report_words import (
    EXPLAINED,
    Json,
    curve_metric,
    duration_text,
    epsilon_text,
    interval_text,
    less_is_better,
    main_metric,
    metric_keys,
    metric_name,
    number,
    unit_of,
    with_interval,
)
from .scores import price
from .statistics.moments import Ends, pool_ends, subtract_ends

__all__ = ["build_view", "study_text"]

NOT_REPORTED: Final = "not reported"


def build_view(results: Json) -> dict[str, Any]:
    """Everything that the template shows, except pictures.

    Args:
        results: the content of ``results.json``, schema version 1.
    """
    sites: Json = results["sites"]
    heldout = [name for name, site in sites.items() if site["role"] == "heldout"]
    training = [name for name, site in sites.items() if site["role"] != "heldout"]
    main = main_metric(results)
    comparators = [_comparator(entry) for entry in results.get("comparators", {}).values()]
    return {
        "results": results,
        "main": metric_name(main),
        "selected_by": metric_name(results["select"]["metric"]),
        "heldout": heldout,
        "training": training,
        "cards": [_card(results, name, main, comparators) for name in heldout],
        "heldout_scores": _scores(results, heldout, comparators),
        "training_scores": _scores(results, training, comparators),
        "comparators": [title for title, _ in comparators],
        "start": start_title(results),
        "verdicts": verdicts(results, heldout or training, main),
        "gap": _gap(sites, training, heldout),
        "dots": dots_chart(results, [*heldout, *training], main, comparators),
        "dots_shapes": dot_shapes(results, comparators, main),
        "curve": metric_curve(results, training, heldout, main),
        "curve_label": metric_name(curve_metric(results, main)),
        "loss": train_curve(results, training, "loss", "mean training loss"),
        "spent": train_curve(results, training, "epsilon", "ε spent"),
        "rounds": [_round(record, training, heldout, curve_metric(results, main)) for record in results["rounds"]],
        "reasons": _reasons(results["rounds"]),
        "privacy": _privacy(results["privacy"], training),
        "explained": [EXPLAINED[key] for key in EXPLAINED if key in metric_keys(results)],
        "study_text": study_text(results["effective_study"]),
        "other_curves": [
            (f"{metric_name(curve_metric(results, main))} by {words}", curve)
            for axis, words in AXES.items()
            if axis != "round" and (curve := metric_curve(results, training, heldout, main, axis))
        ],
        "evidence": evidence_view(results.get("evidence")),
        "sections": _sections(results, heldout),
        "groups": groups(results, [*heldout, *training]),
        "calibration": calibration(results, [*heldout, *training]),
        "failed": failures(results, [*heldout, *training]),
        "checklists": checklists(results),
        "duration": duration_text(results["seconds"]),
    }


def _sections(results: Json, heldout: Sequence[str]) -> list[tuple[str, str]]:
    """Anchors of the page and their names, in order."""
    found: Json = results.get("evidence") or {}
    there = {
        "heldout": bool(heldout), "odd": bool(found.get("notes") or found.get("failures")),
        "gap": bool(found.get("gap")),
        "comparators": bool(found.get("comparisons")), "matrix": len(found.get("matrix", {}).get("rows", ())) > 1,
        "strata": bool(found.get("strata")), "seeds": bool(found.get("seeds")), "scores": bool(found.get("scores")),
        "charts": len(results["rounds"]) > 1,
        "groups": any(site.get("strata") or site.get("lesion_sizes") for site in results["sites"].values()),
        "calibration": any(site.get("reliability") for site in results["sites"].values()),
    }  # fmt: skip
    names = (
        ("heldout", "held out"), ("odd", "missing or odd"), ("cohort", "cohort"), ("training", "trained"),
        ("gap", "gap"), ("comparators", "comparisons"), ("matrix", "matrix"), ("strata", "groups"),
        ("groups", "groups by hospital"), ("calibration", "calibration"), ("seeds", "seeds"),
        ("scores", "all metrics"), ("charts", "charts"), ("privacy", "privacy"), ("rounds", "rounds"),
        ("provenance", "provenance"), ("checklists", "checklists"),
    )  # fmt: skip
    return [(anchor, text) for anchor, text in names if there.get(anchor, True)]


def _comparator(entry: Json) -> tuple[str, Json]:
    return entry["title"], entry["sites"]


def _price(results: Json, name: str) -> str:
    """What a score cost in privacy: the site's own ε, or for a held-out site the largest of the training sites."""
    return price(results["privacy"], name, heldout=results["sites"][name]["role"] == "heldout")


def _missing(results: Json, name: str, key: str) -> str:
    """Why a metric of a site is not there."""
    site = results["sites"][name]
    if not site["metrics"]:
        state = site.get("state", "answered")
        return f"{NOT_REPORTED}: the hospital returned no metric" if state == "answered" else f"{NOT_REPORTED}: {state}"
    if unit_of(key):
        if results["status"] != "complete":
            return f"{NOT_REPORTED}: computed at the end of a run"
        return f"{NOT_REPORTED}: voxel size unknown"
    return NOT_REPORTED


def _scores(results: Json, names: Sequence[str], comparators: Sequence[tuple[str, Json]]) -> list[dict[str, Any]]:
    """Rows of a score table: a hospital has one row per metric."""
    rows = []
    for name in names:
        site = results["sites"][name]
        keys = metric_keys(results) if site["metrics"] else [main_metric(results)]
        beside = [other.get(name, {}).get("metrics", {}) for _, other in comparators]
        for position, key in enumerate(keys):
            estimate = site["metrics"].get(key)
            rows.append(
                {
                    "site": name, "first": position == 0, "span": len(keys), "size": site["public_size"],
                    "price": _price(results, name), "metric": metric_name(key),
                    "score": number(key, estimate["mean"]) if estimate else "",
                    "interval": interval_text(key, estimate) if estimate else "",
                    "n": estimate["n"] if estimate else "",
                    "missing": "" if estimate else _missing(results, name, key),
                    "untrained": with_interval(key, start_of(site).get(key)),
                    "others": [with_interval(key, other.get(key)) for other in beside],
                }
            )  # fmt: skip
    return rows


def _card(results: Json, name: str, main: str, comparators: Sequence[tuple[str, Json]]) -> dict[str, Any]:
    """The headline of one held-out hospital."""
    site = results["sites"][name]
    estimate = site["metrics"].get(main)
    beside = [(start_title(results), start_of(site).get(main))]
    beside += [(title, other.get(name, {}).get("metrics", {}).get(main)) for title, other in comparators]
    return {
        "site": name,
        "score": number(main, estimate["mean"]) if estimate else "–",
        "interval": interval_text(main, estimate) if estimate else "",
        "n": estimate["n"] if estimate else 0,
        "missing": "" if estimate else _missing(results, name, main),
        "price": _price(results, name),
        "beside": [(title, with_interval(main, other)) for title, other in beside],
    }


def _gap(sites: Json, training: Sequence[str], heldout: Sequence[str]) -> list[dict[str, str]]:
    """Per metric: means over patients of training and of held-out hospitals, and their difference with its interval."""

    def pooled(names: Sequence[str], key: str) -> Ends | None:
        found = [sites[name]["metrics"][key] for name in names if key in sites[name]["metrics"]]
        ends = [Ends(n=e["n"], mean=e["mean"], low=e["ci95"][0], high=e["ci95"][1]) for e in found]
        return pool_ends(ends) if ends else None

    rows = []
    for key in dict.fromkeys(key for site in sites.values() for key in site["metrics"]):
        inside, outside = pooled(training, key), pooled(heldout, key)
        if inside is None or outside is None:
            continue
        apart = subtract_ends(outside, inside)
        # For distances more is worse.
        better = apart.mean < 0 if less_is_better(key) else apart.mean > 0
        verdict = "better on held-out hospitals" if better else "worse on held-out hospitals"
        rows.append(
            {
                "metric": metric_name(key), "training": with_interval(key, _estimate(inside)),
                "heldout": with_interval(key, _estimate(outside)),
                "difference": estimate_text(key, _estimate(apart), signed=True),
                "verdict": "no difference shown" if apart.low <= 0 <= apart.high else verdict,
            }
        )  # fmt: skip
    return rows


def _estimate(ends: Ends) -> dict[str, Any]:
    return {"mean": ends.mean, "ci95": [ends.low, ends.high], "n": ends.n}


def _round(record: Json, training: Sequence[str], heldout: Sequence[str], key: str) -> dict[str, Any]:
    """A row of the rounds' table."""

    def mean(values: Sequence[float | None], digits: int) -> str:
        known = [value for value in values if value is not None]
        return f"{sum(known) / len(known):.{digits}f}" if known else "–"

    def scores(names: Sequence[str]) -> list[float | None]:
        return [record["metrics"][n][key]["mean"] for n in names if key in record["metrics"].get(n, {})]

    refusals, trained = record["refusals"], record["train"]
    asked = set(trained) | {name for name in refusals if name in training}
    missing = "; ".join(f"{name} missing: {reason}" for name, reason in sorted(refusals.items()))
    answered = f"{len(trained)} of {len(asked)} sites" if asked else "before training"
    return {
        "number": record["round"],
        "seconds": f"{record['seconds']:.1f}",
        "down": _megabytes(record["bytes_down"]),
        "up": _megabytes(record["bytes_up"]),
        "loss": mean([entry.get("loss") for entry in trained.values()], 3),
        "training": mean(scores(training), 2),
        "heldout": mean(scores(heldout), 2),
        "answered": answered + (f", {missing}" if missing else ""),
        "fault": bool(missing),
    }


def _megabytes(count: int) -> str:
    """One decimal, or two digits of what is less than 100 kB."""
    return f"{count / 1e6:.1f}" if count >= 1e5 or not count else f"{count / 1e6:.2g}"


def _reasons(rounds: Sequence[Json]) -> list[tuple[str, str]]:
    """The reason codes that occur, with their fixed public text."""
    codes = sorted({code for record in rounds for code in record["refusals"].values()})
    return [(code, Reason(code).public_text if code in set(Reason) else "") for code in codes]


def _privacy(privacy: Json, training: Sequence[str]) -> dict[str, Any]:
    """The privacy statement as rows of (what, value), and ε and σ per hospital."""
    facts = [("unit", f"one {privacy['unit']}, with all scans")]
    for key, name in (
        ("neighbouring_relation", "neighbouring relation"), ("protects_against", "protects against"),
        ("tolerate", "hospitals that may drop out or collude"),
        ("delta", "δ"), ("clip", "clipping norm C"), ("sample_rate", "sampling rate q per step"),
        ("steps", "private steps per hospital"), ("accountant", "accountant"),
        ("metrics", "metrics that leave"), ("metrics_epsilon", "ε of all evaluations, for patients who do not train"),
    ):  # fmt: skip
        value = privacy.get(key)
        if value is not None:
            facts.append((name, f"{value:g}" if isinstance(value, float) else str(value)))
    sigma = privacy.get("noise_multiplier", {})
    spent = privacy["epsilon"]
    rows = [
        {
            "site": name,
            "epsilon": epsilon_text(spent[name]) if name in spent else "nothing spent",
            "delta": f"{privacy.get('delta_by_site', {}).get(name, privacy['delta']):g}" if name in spent else "–",
            "sigma": f"{sigma[name]:.3f}" if name in sigma else "–",
        }
        for name in training
    ]
    return {"private": privacy["mode"] != "none", "facts": facts, "rows": rows, "worst": _worst(spent)}


def _worst(spent: Mapping[str, float]) -> str:
    return epsilon_text(max(spent.values())) if spent else ""


def study_text(effective: Json) -> list[tuple[str, str]]:
    """The sections of a study as text in TOML's notation."""
    return [(section, _toml(values)) for section, values in effective.items()]


def _toml(values: Json) -> str:
    """A section of the effective study in TOML's notation, for reading; a table within it as dotted keys."""
    lines = []
    for key, value in values.items():
        inner = {f"{key}.{name}": item for name, item in value.items()} if isinstance(value, dict) else {key: value}
        lines += [f"{name} = {_toml_value(item)}" for name, item in inner.items()]
    return "\n".join(lines)


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml_value(item) for item in value) + "]"
    return f"{value:g}" if isinstance(value, float) else str(value)

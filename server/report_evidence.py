# SPDX-License-Identifier: Apache-2.0
"""The evidence of several models on the same patients, as the report's words and tables.

Evidence is made by :mod:`fedneuro.server.statistics.evidence` where single patients' values are, and saved as
``evidence.json`` beside the run. Evidence that is cut or of another schema is stated in the report as what it is.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from .report_words import Json, digits_of, interval_text, is_unbounded, metric_name, number, with_interval

__all__ = ["ALL", "ALL_SITES", "EVIDENCE", "OURS", "estimate_text", "evidence_view", "p_text", "read_evidence"]

EVIDENCE: Final = "evidence.json"
EVIDENCE_VERSION: Final = 1
ALL: Final = "*"
OURS: Final = "federated"
ALL_SITES: Final = "all sites"
_NOTHING: Final[Mapping[str, Any]] = {
    "schema_version": EVIDENCE_VERSION, "metric": "", "higher_is_better": True, "resamples": 0, "margin": 0.0,
    "models": {}, "sites": [], "heldout": [], "scores": [], "comparisons": [],
    "matrix": {"rows": [], "columns": [], "cells": {}}, "gap": [], "disparity": [], "strata": [], "seeds": [],
    "cohort": [], "failures": {}, "steps": {}, "notes": [],
}  # fmt: skip


def read_evidence(out: Path) -> dict[str, Any] | None:
    """The evidence that lies beside a run; None where there is none. Where it cannot be read, its notes say so."""
    path = out / EVIDENCE
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return {**_NOTHING, "notes": [f"{EVIDENCE} is cut or no JSON: run fedneuro-sim report again to make it"]}
    if not isinstance(found, dict) or found.get("schema_version") != EVIDENCE_VERSION:
        version = found.get("schema_version") if isinstance(found, dict) else None
        text = f"{EVIDENCE} has schema_version {version}, this FedNeuro reads {EVIDENCE_VERSION}"
        return {**_NOTHING, "notes": [text]}
    return {**_NOTHING, **found}


def evidence_view(evidence: Json | None) -> dict[str, Any] | None:
    """What the template shows of it; None where there is no evidence."""
    if not evidence:
        return None
    found = {**_NOTHING, **evidence}
    found["index"] = {(row["model"], row["site"], row["metric"]): row for row in found["scores"]}
    key = found["metric"]
    resampled = {(row.get("difference") or {}).get("method") for row in found["comparisons"]}
    return {
        "metric": metric_name(key),
        "resampled": " or ".join(name for name in ("BCa", "percentile") if name.lower() in resampled) or "BCa",
        "ranked": any("test" in row for row in found["comparisons"]),
        "by_patient": any("test" not in row for row in found["comparisons"]),
        "intervals": interval_words(found["scores"]), "cover": coverage_words(found["scores"]),
        "several": len({row["metric"] for row in found["comparisons"]}) > 1,
        "cards": [
            _card(found, site) for site in found["sites"] if _score(found, OURS, site) or site in found["heldout"]
        ],
        "comparisons": [
            _comparison(found, row)
            for site in found["sites"]
            for row in found["comparisons"]
            if row["site"] == site
        ],
        "overall": [_comparison(found, row) for row in found["comparisons"] if row["site"] == ALL],
        "all": with_interval(key, _usable(_score(found, OURS, ALL))),
        "matrix": _matrix(found),
        "gap": [
            {
                "site": _site(row["site"]), "paired": row["paired"],
                "n": (row["difference"] or {}).get("n", 0),
                **{part: estimate_text(key, row[part], signed=part == "difference")
                   for part in ("inside", "outside", "difference")},
            }
            for row in found["gap"]
        ],
        "disparity": [
            {
                "model": _title(found, row["model"]), "worst": row["worst"], "value": number(key, row["value"]),
                "range": number(key, row["range"]), "sd": number(key, row["sd"]),
            }
            for row in found["disparity"]
        ],
        "scores": _other_scores(found),
        "strata": [{**row, "value": estimate_text(key, row)} for row in found["strata"]],
        "seeds": [
            {
                "model": _title(found, row["model"]), "site": row["site"], "seeds": row["seeds"],
                "value": f"{row['mean']:.3f} ± {row['sd']:.3f}", "range": f"{row['lowest']:.3f}–{row['highest']:.3f}",
            }
            for row in found["seeds"]
        ],
        "cohort": _cohort(found["cohort"]),
        "steps": [{"name": name, **values} for name, values in found["steps"].items()],
        "failures": list(found["failures"].items()),
        "notes": list(dict.fromkeys(found["notes"])),
        "resamples": found["resamples"],
        "margin": found["margin"],
    }  # fmt: skip


def interval_words(scores: Sequence[Json]) -> str:
    """How the intervals of means were made, as far as the scores say."""
    used = {row.get("method") for row in scores}
    known = {
        "bounded": "of scores from 0 to 1 by the Bayesian bootstrap with half an unseen patient at 0 and at 1 (as "
        "Jeffreys' interval of a proportion), which allows for failures too rare for this cohort to show",
        "bca": "of others by BCa bootstrap" if "bounded" in used else "BCa bootstrap",
        "percentile": "percentile bootstrap",
        "delong, logit": "AUROC and C-index by DeLong's variance or the jackknife, on the logit scale",
        "pairs apart": "an AUROC or C-index of 0 or 1 by its pairs that share no patient",
    }
    return "; ".join(words for method, words in known.items() if method in used)


def coverage_words(scores: Sequence[Json]) -> str:
    """What the intervals of means reached in ``fedneuro-sim bench coverage`` (docs/evidence.md)."""
    methods = {(row.get("method"), is_unbounded(row["metric"])) for row in scores}
    if not {name for name, _ in methods} & {"bounded", "bca", "percentile"}:
        return ""
    if (("bca", False) in methods or ("percentile", False) in methods) and ("bounded", False) not in methods:
        return (
            "In simulations they cover 91 to 98 % from 30 patients on: these know nothing of failures that the cohort "
            "does not show"
        )
    return (
        "In simulations those of means cover 93 to 97 % from 30 patients on; under 20, the ones of distances and "
        "errors are too short"
    )


def p_text(value: float | None) -> str:
    """``0.034``, ``<0.001``, or a dash.

    Example:
        >>> p_text(0.0342), p_text(0.0001), p_text(None)
        ('0.034', '<0.001', '–')
    """
    if value is None:
        return "–"
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def estimate_text(key: str, estimate: Json | None, *, signed: bool = False) -> str:
    """``0.61 (0.55–0.67)``, or for a difference ``+0.021 (+0.004 to +0.038)``; without an interval, the mean alone."""
    if not estimate or estimate.get("mean") is None:
        return "–"
    if signed:
        digits = digits_of(key) if is_unbounded(key) else 3
        text = _signed(estimate["mean"], digits)
        ends = estimate.get("ci95") if _has_width(estimate) else None
        return f"{text} ({_signed(ends[0], digits)} to {_signed(ends[1], digits)})" if ends else f"{text} (no interval)"
    text = number(key, estimate["mean"])
    return f"{text} ({interval_text(key, estimate)})" if _has_width(estimate) else f"{text} (no interval)"


def _has_width(estimate: Json) -> bool:
    """Whether an interval is known: of equal values it is not, and 0.60 to 0.60 would look sure."""
    return bool(estimate.get("ci95")) and estimate.get("method") != "constant"


def _signed(value: float, digits: int = 2) -> str:
    value = round(value, digits)
    return ("+" if value > 0 else "\N{MINUS SIGN}" if value < 0 else "") + f"{abs(value):.{digits}f}"


def _usable(estimate: Json | None) -> Json | None:
    return estimate if estimate and estimate.get("mean") is not None and _has_width(estimate) else None


def _score(found: Json, model: str, site: str, metric: str = "") -> Json | None:
    row: Json | None = found["index"].get((model, site, metric or found["metric"]))
    return row


def _title(found: Json, model: str) -> str:
    return str(found["models"].get(model, model))


def _site(site: str) -> str:
    return ALL_SITES if site == ALL else site


def _comparison(found: Json, row: Json) -> dict[str, Any]:
    key = row["metric"]
    effect = row.get("effect") or {}
    text = "–"
    if effect.get("value") is not None:
        text = f"{effect['value']:+.2f}".replace("-", "\N{MINUS SIGN}")
        if effect.get("ci95"):
            text += " ({} to {})".format(*map(_signed, effect["ci95"]))
    return {
        "site": _site(row["site"]), "model": _title(found, row["model"]), "metric": metric_name(key),
        "n": (row.get("difference") or {}).get("n", 0),
        "ours": estimate_text(key, row["ours"]), "theirs": estimate_text(key, row["theirs"]),
        "difference": estimate_text(key, row.get("difference"), signed=True),
        "p": p_text(row["p"]), "p_holm": p_text(row["p_holm"]), "p_bootstrap": p_text(row.get("p_bootstrap")),
        "effect": text, "not_worse": p_text((row.get("equivalence") or {}).get("p_not_worse_holm")),
        "verdict": _verdict(row), "note": row.get("note", ""),
    }  # fmt: skip


def _verdict(row: Json) -> str:
    """What the test says, in a word."""
    difference = row.get("difference")
    if not difference or row["p_holm"] is None:
        return "not tested"
    if row["p_holm"] < 0.05:
        # Wilcoxon's test is of ranks: its direction is that of the effect, not of the mean.
        effect = row["effect"]["value"] if row.get("effect") else difference["mean"]
        return "federated is better" if effect > 0 else "federated is worse"
    not_worse = (row.get("equivalence") or {}).get("p_not_worse_holm")
    return "no difference shown" + ("; not worse by the margin" if not_worse is not None and not_worse < 0.05 else "")


def _card(found: Json, site: str) -> dict[str, Any]:
    """The first thing that a reader sees of a site."""
    key, own = found["metric"], _score(found, OURS, site) or {"mean": None, "n": 0}
    mean = own["mean"]
    why = "none: the same for every patient" if own.get("method") == "constant" else "none: too few patients"
    why = "none: no value, see what is missing or odd" if mean is None else why
    return {
        "site": site,
        "heldout": site in found["heldout"],
        "score": "–" if mean is None else number(key, mean),
        "interval": interval_text(key, own) if _has_width(own) else why,
        "n": own["n"],
        "failed": own.get("failed", 0),
        "rows": [
            _comparison(found, row)
            for row in found["comparisons"]
            if row["site"] == site and row["model"] != f"local: {site}" and row["metric"] == key
        ],
    }


def _matrix(found: Json) -> dict[str, Any] | None:
    matrix, key = found["matrix"], found["metric"]
    if len(matrix["rows"]) < 2:
        return None
    rows = []
    for model in matrix["rows"]:
        cells = []
        for site in matrix["columns"]:
            estimate = matrix["cells"].get(model, {}).get(site)
            shade = 0.0
            if estimate and estimate.get("mean") is not None and 0 <= estimate["mean"] <= 1:
                shade = estimate["mean"] if found["higher_is_better"] else 1 - estimate["mean"]
            cells.append(
                {
                    "text": estimate_text(key, estimate), "n": estimate["n"] if estimate else 0,
                    "own": model in (f"local: {site}", "fine-tuned"), "shade": f"{100 * shade * 0.55:.0f}",
                }
            )  # fmt: skip
        rows.append({"model": _title(found, model), "cells": cells, "ours": model == OURS})
    return {"columns": matrix["columns"], "rows": rows}


def _other_scores(found: Json) -> list[dict[str, Any]]:
    """Every metric of our model and the others, in one table: model, site, then metrics as columns.

    A metric that is not known of all patients says of how many: undefined ones, such as HD95 without a voxel size, have
    no part in its mean.
    """
    metrics = list(dict.fromkeys(row["metric"] for row in found["scores"]))
    places = list(dict.fromkeys((row["model"], row["site"]) for row in found["scores"]))
    rows: list[dict[str, Any]] = []
    for model, site in places:
        known = {m: score for m in metrics if (score := _score(found, model, site, m))}
        judged = max(score["n"] + score.get("failed", 0) for score in known.values())
        texts = [
            estimate_text(m, known.get(m)) + (f", n = {known[m]['n']}" if m in known and known[m]["n"] < judged else "")
            for m in metrics
        ]
        values = list(zip(map(metric_name, metrics), texts, strict=True))
        rows.append({"model": _title(found, model), "site": _site(site), "n": judged, "values": values})
    return rows


def _cohort(rows: Sequence[Json]) -> dict[str, Any] | None:
    if not rows:
        return None
    traits = sorted({trait for row in rows for trait in row["groups"]})
    return {
        "traits": traits,
        "rows": [
            {
                "site": row["site"], "patients": row["patients"],
                "cells": [
                    ", ".join(f"{value} {count}" for value, count in row["groups"].get(trait, {}).items())
                    or "not reported"
                    for trait in traits
                ],
            }
            for row in rows
        ],
    }  # fmt: skip

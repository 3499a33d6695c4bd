# SPDX-License-Identifier: Apache-2.0
"""The row that every result must beat: the model of round 0, before any patient of the study was used.

Where a study starts from public pre-training (``[training.init]``), private training is worth its ε only if it
beats that row. The report says so in words. A paired test by patient would say more, but needs values of single
patients, which do not leave a hospital; so the 95 % intervals decide, which is careful.
"""

from collections.abc import Sequence

from .report_words import Json, less_is_better, metric_name, with_interval

__all__ = ["start_of", "start_title", "verdicts"]


def start_title(results: Json) -> str:
    """Name of the row, such as "untrained network"."""
    return str(results.get("start", {}).get("title", "untrained network"))


def start_of(site: Json) -> Json:
    """Estimates of the round-0 model at a site, by metric; results of older runs have the untrained one only."""
    found: Json = site.get("start") or site.get("untrained", {})
    return found


def verdicts(results: Json, names: Sequence[str], key: str) -> list[str]:
    """One sentence per site on whether training beat the public start; none where the start is an untrained network.

    Args:
        results: the content of ``results.json``.
        names: sites to speak of.
        key: the metric.
    """
    if not results.get("start", {}).get("from"):
        return []
    private = results["privacy"]["mode"] != "none"
    sentences = []
    for name in names:
        own, start = results["sites"][name]["metrics"].get(key), start_of(results["sites"][name]).get(key)
        if not own or not start:
            continue
        sign = -1.0 if less_is_better(key) else 1.0
        (low, high), (start_low, start_high) = own["ci95"], start["ci95"]
        apart = low > start_high if sign > 0 else high < start_low
        both = (
            f"{metric_name(key)} {with_interval(key, own)} against {with_interval(key, start)} "
            f"before any training here ({start_title(results)})"
        )
        if apart:
            verdict = "Training beat it: the 95 % intervals do not overlap."
        elif sign * own["mean"] > sign * start["mean"]:
            price = "was worth its ε" if private else "helped"
            verdict = (
                f"The mean is better, but the 95 % intervals overlap: this run does not show that training {price}."
            )
        else:
            verdict = "Training did not beat it" + (": its ε bought nothing here." if private else ".")
        sentences.append(f"{name}: {both}. {verdict}")
    return sentences

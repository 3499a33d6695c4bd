# SPDX-License-Identifier: Apache-2.0
"""Which round's model is kept: the best declared metric on *training* sites; held-out sites never choose."""

from collections.abc import Mapping

from ..models.metrics import higher_is_better
from ..privacy.contract import Role
from ..privacy.released import THRESHOLD, uses_threshold
from ..privacy.study import Study
from .store import RoundRecord, SiteRecord

__all__ = ["final_threshold", "select_round", "training_value"]


def select_round(study: Study, rounds: list[RoundRecord], sites: Mapping[str, SiteRecord]) -> int:
    """The round whose model is kept: best ``select`` metric on training sites, weighted by public size.

    Ties and ``"last"`` go to the later round. Round 0, the untrained model, is never chosen once a round was
    trained. Where no round has the metric (no validation patient), the last round is taken.
    """
    name, best, chosen = study.select_metric, float("-inf"), rounds[-1].round if rounds else 0
    if name == "last":
        return chosen
    sign = 1.0 if higher_is_better[name] else -1.0
    for record in rounds:
        value = training_value(record, name, sites)
        if record.round and value is not None and sign * value >= best:
            best, chosen = sign * value, record.round
    return chosen


def training_value(record: RoundRecord, metric: str, sites: Mapping[str, SiteRecord]) -> float | None:
    """Mean of ``metric`` over the training sites that returned it, weighted by public size; None if none did."""
    pairs = [
        (site.public_size, record.metrics[name][metric]["mean"])
        for name, site in sites.items()
        if site.role == Role.TRAIN.value and metric in record.metrics.get(name, {})
    ]
    return sum(w * v for w, v in pairs) / sum(w for w, _ in pairs) if pairs else None


def final_threshold(
    study: Study, rounds: list[RoundRecord], number: int, sites: Mapping[str, SiteRecord]
) -> float | None:
    """The threshold at which sensitivity and specificity of round ``number`` are judged everywhere.

    The mean of the training sites' own best ones, on their validation patients, weighted by public size. None where the
    study needs none, or the round was not evaluated: sites then take 0.5.
    """
    record = next((r for r in rounds if r.round == number), None)
    if record is None or not uses_threshold(study):
        return None
    return training_value(record, THRESHOLD, sites)

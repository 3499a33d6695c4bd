# SPDX-License-Identifier: Apache-2.0
"""What leaves of a site's metrics: nothing for small cohorts, public counts only, and noise where the study says so.

``privacy.metrics`` of the study:

    suppress   exact means with their bootstrap intervals, unless fewer patients than the larger of the study's and
               the hospital's minimum were evaluated (of a sensitivity or specificity: fewer of its class). They are not
               differentially private, and every report says so.
    noise      each mean with Gaussian noise, reserved in the ledger first. Released for every cohort whose *public*
               size meets the minimum: whether something is released must not depend on the true count.

The number of patients that goes with a metric is the public one in every mode; the true count stays.

Cells (:func:`~fedneuro.privacy.released.is_cell`: the patients of a stratum, of a bin of the reliability curve, with
lesions of a size) leave in mode ``suppress`` only, from :data:`~fedneuro.privacy.released.MIN_CELL` patients or the
minimum above, if that is larger; their count is rounded to the nearest five. Where the cells that are held back have
fewer patients together than that, the smallest cell of the same stratum is held back too: from the mean over all
patients and those of the other cells the rest could be computed.

Noise. A patient's values v_1 … v_m are in [0, 1]. What is released is Σ (v - 1/2), so zero-out of one patient moves
it by at most √m / 2 in L2 norm; N(0, σ²m/4) is added from the operating system's generator, and the sum is divided
by the public count. The interval is made of public numbers: the noise, and 1/4, the largest variance of a value
in [0, 1]. The same request for the same model is answered with the same numbers, which costs nothing again.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace

import numpy as np

from ..models.state import digest
from ..privacy.budget import metric_event, site_delta
from ..privacy.contract import Arrays, Estimate
from ..privacy.ledger import Ledger
from ..privacy.noise import SecureRandom
from ..privacy.released import MIN_CELL, split_cells
from .data.split import public_size
from .session import Session

__all__ = ["cells_that_leave", "noised", "release"]

DIGITS = 4
"""Noised values are rounded to so many digits, far coarser than their floating-point spacing (Mironov 2012)."""


def release(
    session: Session, number: int, arrays: Arrays, exact: Mapping[str, Estimate], *, final: bool
) -> dict[str, Estimate]:
    """What may leave of the ``exact`` metrics of the model ``arrays`` of round ``number``.

    Raises:
        BudgetExhausted, LedgerDistrusted: the ledger does not cover a noised release; nothing leaves.
    """
    study, settings = session.study, session.settings
    least = max(study.evaluation.min_patients, settings.min_patients)
    patients = session.public_evaluated
    if patients < least:
        return {}
    if study.privacy.metrics == "suppress":
        whole, cells = split_cells(exact)
        leaving = {name: replace(estimate, n=patients) for name, estimate in whole.items() if estimate.n >= least}
        return leaving | cells_that_leave(cells, max(least, MIN_CELL))
    names = _names(session)
    path = session.folder / "released-metrics.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    key = f"{number} {'final' if final else 'round'} {digest(arrays)}"
    if key not in known:
        event = metric_event(study, settings.public_size)
        ledger = Ledger(settings.ledger, settings.name)
        charge = ledger.reserve(
            study.hash,
            settings.dataset_id,
            number,
            event,
            delta=site_delta(study.privacy.delta, settings.public_size),
            budget_epsilon=study.privacy.metrics_epsilon,
            lifetime=settings.lifetime,
            purpose="metrics",
        )
        sums = [(exact[name].mean - 0.5) * exact[name].n if name in exact else 0.0 for name in names]
        found = noised(sums, event.noise_multiplier, patients, SecureRandom())
        known[key] = {name: asdict(estimate) for name, estimate in zip(names, found, strict=True)}
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(known), encoding="utf-8")
        temporary.replace(path)
        ledger.settle(charge.id)
    return {name: Estimate(**values) for name, values in known[key].items()}


def cells_that_leave(cells: Mapping[str, Estimate], least: int) -> dict[str, Estimate]:
    """Cells of at least ``least`` patients, with rounded counts, and none from which a smaller one could be computed.

    Example:
        >>> counts = {"dice:sex:F": 12, "dice:sex:M": 9, "dice:sex:other": 3}
        >>> cells = {name: Estimate(mean=0.5, low=0.5, high=0.5, n=n) for name, n in counts.items()}
        >>> [(name, cell.n) for name, cell in cells_that_leave(cells, 5).items()]
        [('dice:sex:F', 10)]
    """
    leaving: dict[str, Estimate] = {}
    groups: dict[str, dict[str, Estimate]] = {}
    for name, estimate in cells.items():
        groups.setdefault(name.rpartition(":")[0], {})[name] = estimate
    for group in groups.values():
        small = {name for name, estimate in group.items() if estimate.n < least}
        rest = sorted(set(group) - small, key=lambda name: (group[name].n, name), reverse=True)
        while rest and 0 < sum(group[name].n for name in small) < least:
            small.add(rest.pop())
        leaving |= {
            name: replace(estimate, n=public_size(estimate.n)) for name, estimate in group.items() if name not in small
        }
    return leaving


def noised(sums: Sequence[float], sigma: float, patients: int, random: SecureRandom) -> list[Estimate]:
    """Private means from sums of (value - 1/2).

    Args:
        sums: one per metric; one patient moves each by at most 1/2.
        sigma: noise multiplier.
        patients: public count, the divisor.
        random: source of the noise.
    """
    scale = sigma * math.sqrt(len(sums)) / 2
    total = np.asarray(sums) + scale * random.normal(len(sums))
    means = np.clip(0.5 + total / patients, 0.0, 1.0)
    half = 1.96 * math.sqrt((scale / patients) ** 2 + 0.25 / patients)
    return [
        Estimate(
            mean=round(float(mean), DIGITS),
            low=round(max(0.0, float(mean) - half), DIGITS),
            high=round(min(1.0, float(mean) + half), DIGITS),
            n=patients,
        )
        for mean in means
    ]


def _names(session: Session) -> list[str]:
    """Every metric of the study and of its labels: a fixed list, whoever was evaluated."""
    study = session.study
    labels = study.task.labels if study.task.kind == "segmentation" and len(study.task.labels) > 1 else ()
    return [key for name in study.metric_names for key in (name, *(f"{name}_{label}" for label in labels))]

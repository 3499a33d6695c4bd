# SPDX-License-Identifier: Apache-2.0
"""Outcomes of patients, read from ``participants.tsv``: a number, or the time to an event that may not have been seen.

What the loss takes follows from the outcome and from public numbers of the study alone (``task.centre``,
``task.scale``, ``task.time_cuts``), never from other patients, so that a patient's gradient knows of nobody else.
"""

import math
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from ...models.spec import TaskSection
from ...privacy.errors import DataError
from .checks import check_target

__all__ = ["Outcome", "check_columns", "outcome_of"]

EVENTS: Final[Mapping[str, bool]] = {
    "1": True, "true": True, "yes": True, "1.0": True, "0": False, "false": False, "no": False, "0.0": False,
}  # fmt: skip

Table = Mapping[str, Mapping[str, str]]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a patient.

    Attributes:
        value: the number, or the time until the event or the end of observation, in ``task.unit``.
        event: survival: whether the event was seen at that time.
    """

    value: float
    event: bool = False

    def label(self, task: TaskSection) -> int | float:
        """What the loss takes: (value - centre) / scale; or the code of :func:`fedneuro.models.losses.hazard`.

        A patient survived the intervals that end by the event. One whose observation ends without it survived those
        of which more than half was seen (Gensheimer & Narasimhan 2019). An event after the last interval is none.

        Example:
            >>> task = TaskSection(kind="survival", target="months", event="died", time_cuts=(6.0, 12.0))
            >>> [Outcome(7.0, True).label(task), Outcome(10.0).label(task), Outcome(99.0, True).label(task)]
            [3, 4, 4]
        """
        if task.kind == "regression":
            return (self.value - task.centre) / task.scale
        cuts = task.time_cuts
        if self.event:
            survived = bisect_right(cuts, self.value)
            return 2 * survived + (survived < len(cuts))
        middles = [(low + high) / 2 for low, high in zip((0.0, *cuts), cuts, strict=False)]
        return 2 * bisect_right(middles, self.value)


def check_columns(table: Table | None, task: TaskSection) -> Table:
    """The table of participants, which must be there with the columns that the task names.

    Raises:
        DataError: no table, or no such column.
    """
    if task.kind == "classification":
        return check_target(table, task.target)
    if table is None:
        raise DataError(
            f"no participants.tsv; expected the outcome of each patient in its column {task.target}; add the file"
        )
    columns = list(next(iter(table.values()), {}))
    meanings = {
        task.target: ("target", "a number for each patient there"),
        task.event: ("event", "1 there where the event was seen, and 0 where it was not"),
    }
    for column, (key, meaning) in meanings.items():
        if column and column not in columns:
            raise DataError(
                f"participants.tsv: no column {column} (it has {', '.join(columns[:6]) or 'none'}); expected "
                f"{meaning}; add it, or name another with task.{key}"
            )
    return table


def outcome_of(table: Table, patient: str, task: TaskSection) -> Outcome:
    """Outcome of a patient.

    Raises:
        DataError: no row, or a value that is no finite number, a time below 0, or an event that is not 0 or 1.
    """
    where, row = f"participants.tsv: {patient}", table.get(patient)
    if row is None:
        raise DataError(f"{where} has no row; expected one with a number in column {task.target}; add it")
    text = row.get(task.target, "")
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    survival = task.kind == "survival"
    if not math.isfinite(value) or (survival and value < 0):
        wanted = ("a time from 0 on" if survival else "a number") + (f" in {task.unit}" if task.unit else "")
        raise DataError(
            f"{where} has {task.target} = {text or 'nothing'!r}; expected {wanted}; "
            "correct it, or take the patient out of the data set"
        )
    if not survival:
        return Outcome(value)
    seen = row.get(task.event, "")
    if seen.lower() not in EVENTS:
        raise DataError(
            f"{where} has {task.event} = {seen or 'nothing'!r}; expected 1 (the event was seen) or 0 (it was not); "
            "correct it"
        )
    return Outcome(value, EVENTS[seen.lower()])

# SPDX-License-Identifier: Apache-2.0
"""The audit log for people: a table for the officer, and one page of what left the hospital."""

import csv
import io
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from jinja2 import Environment

from .audit_chain import Entry

__all__ = ["Egress", "egress", "egress_html", "egress_text", "to_csv", "to_json"]

_FIRST = ("n", "at", "kind", "message", "study", "round", "final", "decision", "rule", "reason", "answer", "arrays",
          "bytes", "metrics", "epsilon", "noise_multiplier", "attempt", "policy", "code")  # fmt: skip
_LAST = ("previous", "hash")


def to_json(entries: Sequence[Entry]) -> str:
    """All entries as a JSON list."""
    return json.dumps(entries, indent=1, sort_keys=True) + "\n"


def to_csv(entries: Sequence[Entry]) -> str:
    """All entries as a table with a column for every field; lists and objects are JSON."""
    others = sorted({key for entry in entries for key in entry} - {*_FIRST, *_LAST})
    columns = [*_FIRST, *others, *_LAST]
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, restval="", lineterminator="\n")
    writer.writeheader()
    for entry in entries:
        writer.writerow({key: _cell(value) for key, value in entry.items()})
    return out.getvalue()


def _cell(value: Any) -> str:
    """Text for a spreadsheet; what it would take for a formula is made plain text."""
    text = value if isinstance(value, str) else json.dumps(value)
    return f"'{text}" if text[:1] in ("=", "+", "@") or (isinstance(value, str) and text.startswith("-")) else text


@dataclass(slots=True)
class Egress:
    """What left for one study.

    Attributes:
        study: its hash; empty for messages that named none.
        first: time of the first message out.
        last: and of the last.
        updates: trained models that left.
        rounds: rounds for which they left.
        bytes: bytes of arrays that left.
        epsilon: ε that the ledger had reached with the last of them; None without privacy.
        metrics: how often each metric left.
        greetings: how often role, declared size and versions left.
        steps: messages of secure aggregation without a model.
        statistics: of each file of statistics that was made to be handed over, ε, or None without noise.
        refusals: how often each reason code left.
    """

    study: str
    first: str = ""
    last: str = ""
    updates: int = 0
    rounds: set[int] = field(default_factory=set)
    bytes: int = 0
    epsilon: float | None = None
    metrics: Counter[str] = field(default_factory=Counter)
    greetings: int = 0
    steps: int = 0
    statistics: list[float | None] = field(default_factory=list)
    refusals: Counter[str] = field(default_factory=Counter)


def egress(entries: Sequence[Entry]) -> list[Egress]:
    """What left, by study, in the order of the first message."""
    found: dict[str, Egress] = {}
    for entry in entries:
        if entry["kind"] != "out":
            continue
        row = found.setdefault(entry.get("study", ""), Egress(study=entry.get("study", "")))
        row.first, row.last = row.first or entry["at"], entry["at"]
        row.bytes += entry.get("bytes", 0)
        answer = entry["answer"]
        if answer in ("TrainReply", "MaskedReply"):
            row.updates += 1
            row.rounds.add(entry["round"])
            row.epsilon = entry.get("epsilon", row.epsilon)
        elif answer == "EvaluateReply":
            row.metrics.update(entry["metrics"])
        elif answer == "HelloReply":
            row.greetings += 1
        elif answer == "Statistics":
            row.statistics.append(entry.get("epsilon"))
        elif answer == "Refusal":
            row.refusals[entry["reason"]] += 1
        else:
            row.steps += 1
    return list(found.values())


def _rows(row: Egress) -> list[tuple[str, str]]:
    rounds = f" (rounds {min(row.rounds)} to {max(row.rounds)})" if row.rounds else ""
    counts = [f"{name} × {count}" for name, count in sorted(row.metrics.items())]
    refusals = [f"{name} × {count}" for name, count in sorted(row.refusals.items())]
    return [
        ("from, to", f"{row.first} to {row.last}"),
        ("trained models", f"{row.updates}{rounds}, {row.bytes:,} bytes of arrays"),
        ("privacy spent", "not counted: no private answer" if row.epsilon is None else f"ε {row.epsilon:.3f}"),
        ("metrics", ", ".join(counts) or "none"),
        ("role, declared size, versions", f"{row.greetings} times"),
        ("steps of secure aggregation", f"{row.steps}"),
        ("statistics of the data", ", ".join(_statistics(value) for value in row.statistics) or "none"),
        ("reason codes", ", ".join(refusals) or "none"),
    ]


def _statistics(epsilon: float | None) -> str:
    return "without noise: counts rounded to 5, percentiles" if epsilon is None else f"noised, ε {epsilon:.3f}"


def _title(row: Egress) -> str:
    return f"Study {row.study}" if row.study else "Messages that named no study"


_NOTHING = "Nothing left."
_END = "Nothing else left: no image, no value of a single patient, no number of patients but the declared one{}."
_COUNTS = " and the rounded ones in statistics without noise"


def _end(rows: Sequence[Egress]) -> str:
    if not rows:
        return _NOTHING
    return _END.format(_COUNTS if any(None in row.statistics for row in rows) else "")


def egress_text(entries: Sequence[Entry], site: str) -> str:
    """One page of what left, as text."""
    lines = [f"What left hospital {site}: {_span(entries)}"]
    for row in egress(entries):
        lines += ["", _title(row), *(f"  {name:<30} {value}" for name, value in _rows(row))]
    return "\n".join([*lines, "", _end(egress(entries))]) + "\n"


def _span(entries: Sequence[Entry]) -> str:
    last = entries[-1]
    return f"entries 1 to {last['n']} of the audit log, {entries[0]['at']} to {last['at']}, last hash {last['hash']}"


_PAGE = Environment(autoescape=True).from_string("""\
<!doctype html>
<html lang="en"><meta charset="utf-8"><title>What left hospital {{ site }}</title>
<style>body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#1b1b1b}
h2{font-size:1rem;margin-top:2rem;word-break:break-all}th{text-align:left;font-weight:600;padding-right:2rem}
th,td{vertical-align:top;border-bottom:1px solid #ddd;padding:.3rem 1rem .3rem 0}</style>
<h1>What left hospital {{ site }}</h1>
<p>{{ span }}</p>
{% for title, rows in tables %}<h2>{{ title }}</h2>
<table>{% for name, value in rows %}<tr><th scope="row">{{ name }}</th><td>{{ value }}</td></tr>
{% endfor %}</table>
{% endfor %}<p>{{ end }}</p>
</html>
""")


def egress_html(entries: Sequence[Entry], site: str) -> str:
    """One page of what left, as HTML that needs nothing from the network."""
    tables = [(_title(row), _rows(row)) for row in egress(entries)]
    return _PAGE.render(site=site, span=_span(entries), tables=tables, end=_end(egress(entries)))

# SPDX-License-Identifier: Apache-2.0
"""Each event of a run as one sentence, for ``logs``, ``watch`` and the dashboard; and the words for who is missing."""

from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

from ..privacy.errors import Reason
from .events import Event

__all__ = ["attendance", "clock", "sentence"]

_DURING = {
    "hello": "when asked to join", "train": "training", "evaluate": "evaluating", "keys": "agreeing on keys",
    "shares": "sharing secrets", "masked": "training", "unmask": "taking the masks off",
}  # fmt: skip


def clock(at: float) -> str:
    """A time in UTC, or nothing where none was saved."""
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M:%S") if at else ""


def attendance(answered: int, asked: int, missing: Mapping[str, int]) -> str:
    """Who took part, such as "4 of 5 sites, HT missing since round 7"."""
    text = f"{answered} of {asked} sites"
    names = sorted(missing.items(), key=lambda item: (item[1], item[0]))
    return "".join([text, *(f", {name} missing since {_round(number)}" for name, number in names)])


def _round(number: int) -> str:
    return f"round {number}" if number else "the start"


def sentence(event: Event) -> str:
    """What happened, in one line."""
    make = _SENTENCES.get(event.kind)
    return make(event, event.values) if make else event.kind


def _started(event: Event, values: Mapping[str, Any]) -> str:
    train = [name for name, role in values["sites"].items() if role == "train"]
    heldout = [name for name, role in values["sites"].items() if role != "train"]
    judges = f"; {', '.join(heldout)} held out" if heldout else ""
    goes_on = f", goes on after round {event.round}" if values["first_round"] > 1 else ""
    return f"started: {', '.join(train)} train{judges}; rounds {values['first_round']} to {values['rounds']}{goes_on}"


def _trained(event: Event, values: Mapping[str, Any]) -> str:
    parts = [f"round {event.round}: {event.site} trained in {values['seconds']:.1f} s"]
    if values.get("loss") is not None:
        parts.append(f"loss {values['loss']:.4f}")
    if values.get("epsilon") is not None:
        parts.append(f"ε {values['epsilon']:.3f} so far")
    if values.get("attempt", 1) > 1:
        parts.append(f"its ledger was charged for this round again (attempt {values['attempt']})")
    return ", ".join(parts)


def _evaluated(event: Event, values: Mapping[str, Any]) -> str:
    intervals = {name: f" [{low:.4f}, {high:.4f}]" for name, (low, high) in values.get("intervals", {}).items()}
    found = [f"{name} {value:.4f}{intervals.get(name, '')}" for name, value in values["metrics"].items()]
    scores = ", ".join(found) or "no metric"
    return f"round {event.round}: {event.site} evaluated{' finally' if values.get('final') else ''}: {scores}"


def _refused(event: Event, values: Mapping[str, Any]) -> str:
    during = _DURING.get(values["during"], values["during"])
    try:
        text = Reason(values["reason"]).public_text
    except ValueError:
        text = "unknown"
    return f"round {event.round}: {event.site} did not answer {during}: {values['reason']} ({text})"


def _waiting(event: Event, values: Mapping[str, Any]) -> str:
    during = _DURING.get(values["during"], values["during"])
    who = ", ".join(values["sites"])
    return f"round {event.round}: waiting up to {values['seconds']:.0f} s for {who}, missing {during}"


def _round_done(event: Event, values: Mapping[str, Any]) -> str:
    who = attendance(values["sites"], values["asked"], values.get("missing", {}))
    return f"round {event.round}: done and saved in {values['seconds']:.1f} s, {who}"


def _stopped(event: Event, values: Mapping[str, Any]) -> str:
    how = "at once" if values["when"] == "now" else "between two rounds"
    return f"stopped {how}, as asked; round {event.round} is saved"


def _joined(event: Event, values: Mapping[str, Any]) -> str:
    return f"{event.site} joined as {values['role']}, {values['public_size']} patients declared"


def _round_started(event: Event, _: Mapping[str, Any]) -> str:
    return f"round {event.round}: started"


def _fell_back(event: Event, values: Mapping[str, Any]) -> str:
    return f"round {values['lost']} cannot be used ({values['text']}): round {event.round} is used instead"


def _final_started(event: Event, _: Mapping[str, Any]) -> str:
    return f"final evaluation of round {event.round}"


def _finished(_: Event, values: Mapping[str, Any]) -> str:
    return f"finished: round {values['selected_round']} was selected"


def _resumed(event: Event, values: Mapping[str, Any]) -> str:
    again = f"; {', '.join(values['again'])} may charge their ledgers for it again" if values["again"] else ""
    return f"round {event.round}: the coordinator's process had died; the run goes on by itself{again}"


def _failed(_: Event, values: Mapping[str, Any]) -> str:
    return f"failed: {values['message']}"


_SENTENCES: Mapping[str, Callable[[Event, Mapping[str, Any]], str]] = {
    "joined": _joined,
    "started": _started,
    "round-started": _round_started,
    "trained": _trained,
    "evaluated": _evaluated,
    "refused": _refused,
    "waiting": _waiting,
    "round-done": _round_done,
    "fell-back": _fell_back,
    "final-started": _final_started,
    "finished": _finished,
    "resumed": _resumed,
    "stopped": _stopped,
    "failed": _failed,
}

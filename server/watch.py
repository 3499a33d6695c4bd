# SPDX-License-Identifier: Apache-2.0
"""A run on a terminal: who answered the launch, and, while it runs, round, sites, metric, ε and faults as they come.

A refusal is printed the moment it is saved, above the table, with the reason code that the hospital gave. Where output
is not a terminal (a log file, CI), every event is one line instead.
"""

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ..privacy.errors import Reason
from .events import Event
from .report_words import Json
from .run_view import RunFollower, RunView, SiteView
from .run_words import clock, sentence
from .scores import headline, heldout_scores, price_per_unit, score_of, spent_so_far

__all__ = ["Screen", "answers_table", "render", "runs_table"]

_URGENT = frozenset({"refused", "waiting", "fell-back", "failed", "stopped"})
_COLOURS = {
    "complete": "green", "running": "green", "failed": "red", "interrupted": "red", "waiting": "yellow",
    "stopped": "yellow",
}  # fmt: skip


class Screen:
    """A context manager that shows a run; give :meth:`show` every view.

    Args:
        console: where to write.
        follower: whose new events are printed.
    """

    def __init__(self, console: Console, follower: RunFollower) -> None:
        self._console, self._follower = console, follower
        self._live = Live(console=console, refresh_per_second=4, transient=True, auto_refresh=False)

    def __enter__(self) -> "Screen":
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def show(self, view: RunView) -> None:
        """Show ``view``, and print what is new."""
        for event in self._follower.new:
            if event.kind in _URGENT or not self._console.is_terminal:
                self._console.print(_line(event), highlight=False, soft_wrap=True)
        if self._console.is_terminal:
            self._live.update(render(view), refresh=True)


def render(view: RunView) -> RenderableType:
    """The run as it is now."""
    head = Text.assemble(
        (view.name, "bold"), "  ", (view.status, _COLOURS.get(view.status, "")),
        f"  round {view.round} of {view.rounds}  {view.who}",
        ("  stops after this round" if view.stopping == "round" else "", "yellow"),
    )  # fmt: skip
    table = Table(box=None, padding=(0, 2, 0, 0))
    losses = any(site.loss is not None for site in view.sites.values())  # under privacy they stay at the hospital
    loss = ["loss"] if losses else []
    for column in ("hospital", "role", "state", *loss, "score", "95 %", "privacy spent for it", "last heard"):
        table.add_column(column, style="dim" if column == "role" else "")
    key, privacy = headline(view, view.study), spent_so_far(view.sites, view.study) if view.study else None
    for _, site in sorted(view.sites.items(), key=lambda item: (item[1].role != "heldout", item[0])):
        score = score_of(site, key, privacy)
        table.add_row(
            Text(site.name), site.role, _state(site), *([_number(site.loss)] if losses else []),
            f"{score.metric} {score.value}" if score else "", score.interval if score else "", _price(site, privacy),
            clock(site.at)[11:],
        )  # fmt: skip
    bar = ProgressBar(total=max(1, view.rounds), completed=max(view.history, default=0), width=60)
    line = Padding(bar, 0)  # a bar alone does not end its line
    return Group(head, line, table, *([Text(view.message, "red")] if view.message else []))


def answers_table(view: RunView) -> Table:
    """What every hospital answered when it was asked whether it joins."""
    table = Table("hospital", "role", "answer", "why", box=SIMPLE_HEAD)
    for _, site in sorted(view.sites.items()):
        if site.role:
            answer, why = "joins", f"{site.public_size} patients declared"
        elif site.reason in ("", Reason.LOST.value, Reason.TIMEOUT.value):
            answer = "has not answered"
            why = f"{site.reason}: {Reason(site.reason).public_text}" if site.reason else ""
        else:
            answer, why = "refuses", f"{site.reason}: {Reason(site.reason).public_text}"
        table.add_row(site.name, site.role, answer, why)
    return table


def runs_table(views: list[RunView]) -> Table:
    """All runs, the latest last."""
    table = Table("run", "status", "round", "hospitals", "held out", "launched", "what", box=SIMPLE_HEAD)
    for view in views:
        status = Text(view.status, _COLOURS.get(view.status, ""))
        what = view.message or (f"round {view.selected_round} selected" if view.selected_round is not None else "")
        launched = clock(view.plan.launched)[:16]
        scores = Text("\n".join(map(str, heldout_scores(view, view.study))))
        table.add_row(view.name, status, f"{view.round} of {view.rounds}", view.who, scores, launched, what)
    return table


def _line(event: Event) -> Text:
    text = Text(f"{clock(event.at)[11:]}  {sentence(event)}")
    if event.kind in _URGENT:
        text.stylize("red" if event.kind == "failed" else "yellow")
    return text


def _state(site: SiteView) -> Text:
    if site.missing_since is not None:
        since = f"round {site.missing_since}" if site.missing_since else "the start"
        return Text(f"{site.missing_reason}, missing since {since}", "red")
    if site.reason:
        return Text(site.reason, "red")
    again = f" (attempt {site.attempt})" if site.attempt > 1 and site.state == "trained" else ""
    return Text(f"{site.state}{again}")


def _price(site: SiteView, privacy: Json | None) -> str:
    """Of a training hospital also before it told a metric."""
    heldout = site.role == "heldout"
    if privacy is None or not (site.metrics or (site.epsilon is not None and not heldout)):
        return ""
    return price_per_unit(privacy, site.name, heldout=heldout)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"

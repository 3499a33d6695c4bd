# SPDX-License-Identifier: Apache-2.0
"""Live progress of a run on a terminal: round, each site's state, loss, ε, metric and the time left.

Where output is not a terminal (a log file, CI), it is one line per round instead.
"""

import time
from types import TracebackType
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from .events import Event

__all__ = ["RunProgress"]


class RunProgress:
    """An observer and a context manager.

    Args:
        console: where to write.
        title: what runs, for the first line.
    """

    def __init__(self, console: Console, title: str) -> None:
        self._console = console
        self._title = title
        self._sites: dict[str, dict[str, Any]] = {}
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("rounds"),
            TimeElapsedColumn(), TextColumn("{task.fields[left]}"), console=console,
        )  # fmt: skip
        self._task = self._bar.add_task(title, total=None, left="")
        self._live = Live(get_renderable=self._render, console=console, refresh_per_second=4, transient=True)
        self._started = 0.0
        self._first = 1
        self._rounds = 0

    def __enter__(self) -> "RunProgress":
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def __call__(self, event: Event) -> None:
        """Take one event."""
        values = event.values
        if event.kind == "started":
            self._sites = {name: {"role": role, "state": "ready"} for name, role in values["sites"].items()}
            self._rounds, self._first = values["rounds"], values["first_round"]
            self._started = time.monotonic()
            self._bar.update(self._task, total=self._rounds, completed=event.round)
            self._say(f"{self._title}: {_roles(values['sites'])}; rounds {self._first} to {self._rounds}")
        elif event.kind == "pre-training":
            self._pre_training(values["step"], values["steps"])
        elif event.kind == "round-started":
            for site in self._sites.values():
                site["fresh"] = False
                site["state"] = "training" if site["role"] == "train" else "waiting"
        elif event.kind == "trained":
            self._set(event.site, state="trained", loss=values["loss"], epsilon=values["epsilon"])
        elif event.kind == "evaluated":
            self._set(event.site, state="evaluated", metrics=values["metrics"], fresh=True)
        elif event.kind == "refused":
            self._set(event.site, state=f"[red]{values['reason']}[/]")
            self._console.print(
                f"[yellow]{event.site}: {values['reason']} ({values['during']}, round {event.round})[/]",
                highlight=False,
            )
        elif event.kind == "round-done":
            self._round_done(event)
        elif event.kind == "final-started":
            self._say(f"  final evaluation of round {event.round}")

    def _pre_training(self, step: int, steps: int) -> None:
        done = step == steps
        what = self._title if done else f"pre-training on phantoms, step {step} of {steps}"
        self._bar.update(self._task, description=what)
        if done or not step:
            self._say(f"{self._title}: pre-training on phantoms, {'done' if done else f'{steps} steps'}")

    def _round_done(self, event: Event) -> None:
        done = event.round - self._first + 1
        left = (time.monotonic() - self._started) / done * (self._rounds - event.round)
        self._bar.update(self._task, completed=event.round, left=f"{_minutes(left)} left")
        answered = f"{event.values['sites']} of {event.values['asked']} sites"
        scores = "  ".join(f"{n} {_first_metric(s)}" for n, s in self._sites.items() if s.get("fresh"))
        seconds = event.values["seconds"]
        self._say(f"  round {event.round}/{self._rounds}  {seconds:.1f} s  {answered}  {scores}  {_minutes(left)} left")

    def _set(self, name: str, **values: Any) -> None:
        self._sites.setdefault(name, {"role": "?"}).update(values)

    def _say(self, line: str) -> None:
        if not self._console.is_terminal:
            self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    def _render(self) -> RenderableType:
        table = Table(box=None, padding=(0, 2, 0, 0))
        for column in ("site", "role", "state", "loss", "ε", "score"):
            table.add_column(column, style="dim" if column == "role" else "")
        for name, site in sorted(self._sites.items(), key=lambda item: item[1]["role"]):
            table.add_row(
                name, site["role"], site.get("state", ""), _number(site.get("loss")), _number(site.get("epsilon")),
                _first_metric(site),
            )  # fmt: skip
        return Group(self._bar, table)


def _roles(sites: dict[str, str]) -> str:
    train = [n for n, r in sites.items() if r == "train"]
    heldout = [n for n, r in sites.items() if r != "train"]
    return f"{', '.join(train)} train" + (f"; {', '.join(heldout)} held out" if heldout else "; no site is held out")


def _first_metric(site: dict[str, Any]) -> str:
    metrics = site.get("metrics") or {}
    return next((f"{name} {value:.3f}" for name, value in metrics.items()), "")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _minutes(seconds: float) -> str:
    return f"{int(seconds // 60)} min {int(seconds % 60):02d} s"

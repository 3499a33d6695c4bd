# SPDX-License-Identifier: Apache-2.0
"""How ``fedneuro-node budget`` writes a ledger's statement and a plan."""

import math
from collections.abc import Iterator

from rich import box
from rich.console import Console
from rich.table import Table

from ..privacy.accounting import NEIGHBOURS
from ..privacy.study import Study
from .budget import Plan, Statement
from .settings import SiteSettings

__all__ = ["plan_lines", "show_statement"]


def show_statement(statement: Statement, settings: SiteSettings) -> None:
    """Print the table of budgets and the state of the ledger."""
    console = Console()
    if not console.is_terminal:
        console.width = 120
    table = Table(title=f"privacy budget of {settings.name}", title_justify="left", box=box.SIMPLE_HEAD)
    for column in ("data set", "for", "spent ε", "with reserved", "left", "budget", "δ", "rounds", "open"):
        table.add_column(column, no_wrap=True, justify="left" if column in ("data set", "for") else "right")
    for line in statement.lines:
        table.add_row(
            line.dataset, line.what, _up(line.settled), _up(line.charged), _down(line.left), _down(line.budget),
            f"{line.delta:g}", str(line.charges), str(line.open),
        )  # fmt: skip
    console.print(table)
    console.print(f"ledger: {statement.verified or 'nothing was ever charged'}", highlight=False, soft_wrap=True)
    console.print(f"unit: the patient; neighbouring relation: {NEIGHBOURS}", highlight=False)


def plan_lines(plan: Plan, study: Study) -> Iterator[str]:
    """What a study would cost, line by line."""
    yield f"study {study.study.name} ({study.hash[:12]}), mode {study.privacy.mode}, δ = {plan.delta:g}:"
    if study.privacy.mode == "none":
        yield "  no patient is promised anything: nothing is charged, and no budget bounds what leaves"
    if plan.noise_multiplier is not None:
        yield f"  noise multiplier σ = {plan.noise_multiplier:g} over {study.total_steps} steps"
    yield _cost("training", *plan.study)
    if plan.metrics is not None:
        yield _cost("metrics", *plan.metrics)
    yield _cost("data set, all studies", *plan.lifetime)
    yield f"  it {'fits' if plan.fits else 'does NOT fit'}; a round that is tried again is charged again"


def _cost(what: str, cost: float, budget: float) -> str:
    return f"  {what}: ε would be {_up(cost)} of {_down(budget)}"


def _up(value: float) -> str:
    """Rounded up: what is spent is never said to be less."""
    return "no bound" if math.isinf(value) else f"{math.ceil(value * 1000 - 1e-6) / 1000:.3f}"


def _down(value: float) -> str:
    """Rounded down: what is left is never said to be more."""
    return "unlimited" if math.isinf(value) else f"{math.floor(value * 1000 + 1e-6) / 1000:.3f}"

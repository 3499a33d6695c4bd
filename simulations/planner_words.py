# SPDX-License-Identifier: Apache-2.0
"""How a privacy plan is shown: two tables on the screen, a picture, and figures for programs."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from ..privacy.accounting import NEIGHBOURS
from ..privacy.errors import EnvironmentProblem
from ..server.store import dumps
from .planner import Plan

__all__ = ["plan_json", "show_plan", "write_plan"]


def show_plan(plan: Plan, console: Console) -> None:
    """Print the sites, what would end first, and what a change would do."""
    study = plan.study
    privacy = study.privacy
    title = (
        f"{study.study.name} ({study.hash[:12]}): mode {privacy.mode}, ε = {privacy.epsilon:g}, "
        f"{study.total_steps} steps in {study.training.rounds} rounds, rate {privacy.sample_rate:g}, "
        f"{plan.parameters} trained parameters"
    )
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for column in (
        "site",
        "public size",
        "δ",
        "σ",
        "adds σ",
        "signal/noise per step",
        "spent before",
        "ε left",
        "covers",
    ):
        table.add_column(column, no_wrap=True, justify="left" if column in ("site", "covers") else "right")
    for site in plan.sites:
        covers = f"all {study.training.rounds} rounds" if site.ends is None else f"{site.ends - 1} rounds"
        table.add_row(
            site.name, str(site.public_size), f"{site.delta:g}", f"{site.sigma:.4g}", f"{site.share:.4g}",
            f"{site.signal_to_noise:.3g}", f"{site.before:.3f}", f"{site.left:.3f}", covers,
        )  # fmt: skip
    console.print(table)
    for line in _remarks(plan):
        console.print(line, highlight=False, soft_wrap=True)
    changes = Table(title="what a change would do, at the site with the least signal", title_justify="left",
                    box=box.SIMPLE_HEAD)  # fmt: skip
    for column in (
        "change",
        "ε with the planned σ",
        "σ for the same ε",
        "signal/noise per step",
        "over all steps",
        "work",
    ):
        changes.add_column(column, no_wrap=True, justify="left" if column == "change" else "right")
    for change in plan.changes:
        changes.add_row(
            change.what, "–" if change.kept is None else f"{change.kept:.3f}", f"{change.sigma:.4g}",
            f"{change.signal_to_noise:.3g}", f"{change.total:.3g}", f"× {change.work:.3g}",
        )  # fmt: skip
    console.print(changes)


def _remarks(plan: Plan) -> Iterator[str]:
    first = plan.first_to_end
    if first is not None and first.ends is not None:
        yield f"{first.name} runs out first: round {first.ends} would be refused"
    else:
        tight = min(plan.sites, key=lambda site: (site.left, site.name))
        yield (
            f"no site runs out; {tight.name} has the least left, ε = {tight.left:.3f}. A round that is tried again is "
            "charged again, and would leave the last round without budget"
        )
    yield (
        "signal/noise: n·q·C, the most that a step's clipped sum can be, over σ·C·√d, the norm of its noise; far "
        "below 1 per step is usual, what counts is the sum over all steps, and that few parameters are trained"
    )
    yield "crops cost no ε: a patient's crops are averaged before clipping, so more of them make its gradient steadier"
    yield f"unit: the patient; neighbouring relation: {NEIGHBOURS}; nothing was spent"


def write_plan(plan: Plan, out: Path) -> None:
    """Write ``plan.json``, ``plan.svg`` and ``plan.png`` (ε against rounds for each site) into ``out``.

    Raises:
        EnvironmentProblem: the folder cannot be written.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.5, 4.5), layout="constrained")
    for site in plan.sites:
        (line,) = axes.plot(
            *zip(*site.curve, strict=True), label=f"{site.name}: σ = {site.sigma:.3g}, δ = {site.delta:g}"
        )
        if site.lifetime:
            label = f"{site.name}: all studies on its data"
            axes.plot(*zip(*site.lifetime, strict=True), linestyle=":", color=line.get_color(), label=label)
        if site.ends is not None:
            axes.axvline(site.ends, color=line.get_color(), linewidth=0.8)
    budget = plan.study.privacy.epsilon
    axes.axhline(budget, color="black", linewidth=0.8, linestyle="--", label=f"budget of the study, ε = {budget:g}")
    axes.set(xlabel="round", ylabel="ε spent", title=f"{plan.study.study.name}, mode {plan.study.privacy.mode}")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize="small")
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "plan.json").write_text(dumps(plan_json(plan)), encoding="utf-8")
        for suffix in ("svg", "png"):
            figure.savefig(out / f"plan.{suffix}", dpi=150)
    except OSError as error:
        raise EnvironmentProblem(
            f"--out {out}: cannot write the plan ({error.strerror}); free or choose a disk"
        ) from error
    finally:
        pyplot.close(figure)


def plan_json(plan: Plan) -> Mapping[str, Any]:
    """The plan as JSON values."""
    first = plan.first_to_end
    return {
        "study": plan.study.study.name,
        "study_hash": plan.study.hash,
        "mode": plan.study.privacy.mode,
        "neighbouring_relation": NEIGHBOURS,
        "epsilon": plan.study.privacy.epsilon,
        "parameters": plan.parameters,
        "first_to_end": None if first is None else first.name,
        "sites": [asdict(site) for site in plan.sites],
        "changes": [asdict(change) for change in plan.changes],
    }

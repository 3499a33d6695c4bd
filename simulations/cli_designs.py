# SPDX-License-Identifier: Apache-2.0
"""``fedneuro-sim loso``, ``cv`` and ``sweep``, and ``--compare`` of ``run``: several runs that answer one question."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

if TYPE_CHECKING:  # these import torch, which --help does not need
    from ..privacy.study import Study
    from ..server.events import Event
    from .designs.execute import Told
    from .designs.plan import Design

__all__ = ["Compare", "check_compare", "compare_run", "finish_again", "is_design", "rebuild", "register"]

StudyFile = Annotated[Path, typer.Argument(metavar="STUDY", help="Study file (TOML).")]
Sites = Annotated[Path, typer.Option("--sites", help="Folder that holds one BIDS folder per hospital.")]
Out = Annotated[
    Path | None,
    typer.Option(
        "--out", help="Folder of the design; the same command goes on where it was. Default: out/ and the study's name."
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override a key of the study (TOML value); may repeat."),
]
Compare = Annotated[
    str,
    typer.Option(
        "--compare",
        metavar="NAMES",
        help="Models on the same patients, separated by commas: local, pooled, untrained, majority, fine-tuned, "
        "no-privacy, previous:FILE.",
    ),
]
Seeds = Annotated[int, typer.Option("--seeds", min=1, max=100, help="Repeat with so many seeds, from study.seed on.")]
Workers = Annotated[int, typer.Option("--workers", min=0, help="Runs side by side; 0: as many as cores allow.")]
Margin = Annotated[
    float, typer.Option("--margin", min=1e-6, help='Margin of "not worse than", in the unit of the headline metric.')
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Start anew; what is in OUT is replaced.")]
MARGIN = 0.02
LINE_SECONDS = 60.0
"""Where there is no terminal, a running task is told of once in so many seconds."""


def register(app: typer.Typer, bench: typer.Typer) -> None:
    """Add the commands to ``fedneuro-sim`` and to its ``bench``."""
    app.command()(loso)
    app.command()(cv)
    app.command()(sweep)
    bench.command()(coverage)


def loso(
    study: StudyFile,
    sites: Sites,
    out: Out = None,
    compare: Compare = "",
    overrides: Set = None,
    seeds: Seeds = 1,
    workers: Workers = 0,
    margin: Margin = MARGIN,
    overwrite: Overwrite = False,
) -> None:
    """Leave one site out: hold out each hospital once, and say how the others' model does there."""
    options = {"compare": compare, "seeds": seeds, "margin": margin}
    _run_design("loso", study, sites, _folder(out, study, "loso"), overrides, options, workers, overwrite)


def cv(
    study: StudyFile,
    sites: Sites,
    out: Out = None,
    compare: Compare = "",
    overrides: Set = None,
    folds: Annotated[int, typer.Option("--folds", min=2, max=50, help="Folds of each hospital's patients.")] = 5,
    seeds: Seeds = 1,
    workers: Workers = 0,
    margin: Margin = MARGIN,
    overwrite: Overwrite = False,
) -> None:
    """Cross-validate: leave each fold of patients out once at every hospital."""
    options = {"compare": compare, "seeds": seeds, "margin": margin, "folds": folds}
    _run_design("cv", study, sites, _folder(out, study, "cv"), overrides, options, workers, overwrite)


def sweep(
    study: StudyFile,
    sites: Sites,
    out: Out = None,
    grid: Annotated[
        list[str] | None,
        typer.Option("--grid", metavar="SECTION.KEY=[A, B]", help="Try every value; with others, every combination."),
    ] = None,
    random: Annotated[
        list[str] | None,
        typer.Option(
            "--random", metavar="SECTION.KEY=SPACE", help="Draw from log(1e-4, 1e-1), uniform(0, 1), int(1, 9), [A, B]."
        ),
    ] = None,
    trials: Annotated[int, typer.Option("--trials", min=1, help="Draws of --random.")] = 10,
    search: Annotated[
        str, typer.Option("--search", help="random, or optuna (pip install 'fedneuro[search]').")
    ] = "random",
    overrides: Set = None,
    seeds: Seeds = 1,
    workers: Workers = 0,
    overwrite: Overwrite = False,
) -> None:
    """Search over any study key; settings are chosen on training hospitals, never on held-out ones."""
    from .designs.space import Space
    from .designs.sweep import run_sweep
    from .designs.sweep_report import finish_sweep

    space = Space.parse(grid or [], random or [], trials=trials, search=search, seeds=seeds)
    out = _folder(out, study, "sweep")
    with _progress() as (begin, tell):
        failures = run_sweep(
            study, overrides or [], sites, out, space,
            workers=_workers(workers), overwrite=overwrite, begin=begin, tell=tell,
        )  # fmt: skip
    results = finish_sweep(out)
    _show_trials(results["trials"])
    _say_where(out)
    _end(failures)


def coverage(
    json_out: Annotated[Path | None, typer.Option("--json", help="Also write the figures to this file.")] = None,
    federations: Annotated[int, typer.Option("--federations", min=10, help="Simulated federations per cell.")] = 2000,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of everything that is drawn.")] = 0,
) -> None:
    """Do intervals cover and families of tests keep their error? Federations whose truth is known."""
    from .benchmarks.coverage import bench_coverage, markdown

    print(markdown(bench_coverage(json_out, federations=federations, seed=seed)))


def check_compare(compare: str, study: "Study") -> None:
    """Refuse wrong names before minutes of training.

    Raises:
        StudyError: an unknown name, or one that does not suit the study.
    """
    if compare:
        from .comparators import parse_compare

        parse_compare(compare, study)


def compare_run(study: "Study", sites: Path, out: Path, compare: str, workers: int) -> dict[str, Any]:
    """The comparators of a plain run that is complete, and its evidence; returns the results."""
    from .comparators import parse_compare
    from .designs.design import Options, perform, prepare
    from .designs.outcome import finish_run

    plan = prepare("run", study, sites, out, Options(compare=parse_compare(compare, study)), overwrite=True)
    with _progress() as (begin, tell):
        failures = perform(plan, workers=_workers(workers, plan.study.training.threads), tell=tell, begin=begin)
    results = finish_run(out)
    _show_evidence(results["evidence"])
    _end(failures)
    return results


def is_design(out: Path) -> bool:
    """Whether ``out`` holds a design, and not a plain run."""
    return (out / "design.json").exists()


def finish_again(out: Path) -> dict[str, Any] | None:
    """Evidence, results and report of a run that was compared; None where ``out`` holds no comparators."""
    from .designs.outcome import finish_run

    return finish_run(out) if (out / "comparators" / "design.json").exists() else None


def rebuild(out: Path) -> None:
    """Write results, tables and report of a design again from its saved state."""
    from .designs.design import load_kind
    from .designs.outcome import finish_design
    from .designs.sweep_report import finish_sweep

    if load_kind(out) == "sweep":
        _show_trials(finish_sweep(out)["trials"])
    else:
        _show_evidence(finish_design(out)["evidence"])
    _say_where(out)


def _run_design(
    design: "Design",
    study: Path,
    sites: Path,
    out: Path,
    overrides: list[str] | None,
    options: Mapping[str, Any],
    workers: int,
    overwrite: bool,
) -> None:
    from ..privacy.study_file import load_study
    from .comparators import parse_compare
    from .designs.design import Options, perform, prepare
    from .designs.outcome import finish_design

    loaded = load_study(study, overrides or [])
    asked: Options = Options(**{**options, "compare": parse_compare(options["compare"], loaded)})
    plan = prepare(design, loaded, sites, out, asked, overwrite=overwrite)
    with _progress() as (begin, tell):
        failures = perform(plan, workers=_workers(workers, plan.study.training.threads), tell=tell, begin=begin)
    results = finish_design(out)
    _show_evidence(results["evidence"])
    _say_where(out)
    _end(failures)


def _folder(out: Path | None, study: Path, design: str) -> Path:
    """Where a design is kept: what was asked, or ``out/STUDY-DESIGN`` beside where the command is typed."""
    return out or Path("out") / f"{study.stem}-{design}"


def _workers(asked: int, threads: int = 1) -> int:
    import os

    return asked or max(1, len(os.sched_getaffinity(0)) // threads)


def _end(failures: Mapping[str, Any]) -> None:
    from .designs.design import raise_failures

    raise_failures(failures)


@contextmanager
def _progress() -> "Iterator[tuple[Any, Told]]":
    """A bar per running task on a terminal; elsewhere a line per task that ends, and each minute how far it is."""
    console = Console(stderr=True)
    bars = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        console=console, disable=not console.is_terminal, transient=True,
    )  # fmt: skip
    running: dict[str, Any] = {}
    told: dict[str, float] = {}
    counts = {"done": 0, "all": 0}

    def begin(tasks: Sequence[Any]) -> None:
        counts["all"] += len(tasks)

    def tell(name: str, event: "Event | None") -> None:
        if event is None:
            counts["done"] += 1
            if name in running:
                bars.remove_task(running.pop(name))
            console.print(f"{counts['done']} of {counts['all']}  {name}", highlight=False)
            return
        if name not in running:
            running[name] = bars.add_task(name, total=None)
        if not console.is_terminal and time.monotonic() - told.get(name, -LINE_SECONDS) >= LINE_SECONDS:
            told[name] = time.monotonic()
            console.print(f"  {name}: {f'round {event.round}' if event.round else 'begins'}", highlight=False)
        if event.kind == "started":
            bars.update(running[name], total=event.values["rounds"], completed=event.round)
        elif event.kind == "round-done":
            bars.update(running[name], completed=event.round)

    with bars:
        yield begin, tell


def _show_evidence(evidence: Mapping[str, Any]) -> None:
    """Print the comparisons, site by site."""
    from ..server.report_design import design_summary
    from ..server.report_evidence import evidence_view

    view = evidence_view(evidence)
    if view is None:
        return
    console = _console()
    table = Table(title=f"{view['metric']} [95 % interval]", title_justify="left", box=box.SIMPLE_HEAD)
    for column in ("site", "federated", "n", "against", "theirs", "difference", "p (Holm)", "effect"):
        table.add_column(column, no_wrap=True)
    for card in view["cards"]:
        own = f"{card['score']} ({card['interval']})"
        table.add_row(card["site"], own, str(card["n"]), "", "", "", "", "")
        for row in card["rows"]:
            table.add_row(
                "",
                row["ours"],
                str(row["n"]),
                row["model"],
                row["theirs"],
                row["difference"],
                row["p_holm"],
                row["effect"],
            )
    for row in view["overall"]:
        table.add_row(
            row["site"], row["ours"], str(row["n"]), _named(row, view["metric"]), row["theirs"], row["difference"],
            row["p_holm"], row["effect"],
        )  # fmt: skip
    console.print(table)
    for text in (*design_summary(evidence), *view["notes"]):
        console.print(text, highlight=False)


def _named(row: Mapping[str, Any], metric: str) -> str:
    """A comparison's model, with its metric where that is not the headline's."""
    return str(row["model"]) if row["metric"] == metric else f"{row['model']}, {row['metric']}"


def _show_trials(trials: Mapping[str, Any]) -> None:
    table = Table(title=trials["words"], title_justify="left", box=box.SIMPLE_HEAD)
    for column in ("rank", "trial", *trials["columns"], f"{trials['metric']}, training", "held out", "ε", "state"):
        table.add_column(column, no_wrap=True)
    for row in trials["rows"]:
        table.add_row(
            row["rank"], row["name"], *row["values"], row["value"], row["heldout"], row["epsilon"], row["state"]
        )
    _console().print(table)


def _console() -> Console:
    console = Console()
    if not console.is_terminal:
        console.width = 160
    return console


def _say_where(out: Path) -> None:
    _console().print(f"report: {out / 'report.html'}", highlight=False, soft_wrap=True)

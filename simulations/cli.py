# SPDX-License-Identifier: Apache-2.0
"""``fedneuro-sim``: studies on one machine."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from ..privacy.errors import BadInput
from ..privacy.exits import run_command
from ..privacy.folders import require_folder
from . import cli_data, cli_designs
from .benchmarks import cli_coordinator, cli_live, cli_metrics

if TYPE_CHECKING:  # these import torch, which --help does not need
    from ..privacy.study import Study
    from .run import Engine, Simulation

__all__ = ["app", "main"]

app = typer.Typer(
    name="fedneuro-sim",
    help="Run a federated study on one machine: the same study file, coordinator and hospitals as a deployment.\n\n"
    "Start here:  fedneuro-sim demo --out out/demo\n\n"
    "Your data:   fedneuro-sim check STUDY, then fedneuro-sim run STUDY --sites DIR --out OUT",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
bench = typer.Typer(help="Measure FedNeuro beside its alternatives, in one run.", no_args_is_help=True)
app.add_typer(bench, name="bench")
cli_coordinator.register(bench)
cli_live.register(bench)
cli_metrics.register(bench)
cli_data.register(app, bench)
cli_designs.register(app, bench)
privacy = typer.Typer(help="Plan what a private study costs, before anything is spent.", no_args_is_help=True)
app.add_typer(privacy, name="privacy")

StudyFile = Annotated[Path, typer.Argument(metavar="STUDY", help="Study file (TOML).")]
Sites = Annotated[Path, typer.Option("--sites", help="Folder that holds one BIDS folder per hospital.")]
Out = Annotated[Path, typer.Option("--out", help="Folder for results, report, model and saved state.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override a key of the study (TOML value); may repeat."),
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the unfinished run in OUT.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the run in OUT.")]
Workers = Annotated[
    int, typer.Option("--workers", min=0, help="Worker processes; 0: as many as sites and cores allow.")
]
Cache = Annotated[Path | None, typer.Option("--cache", help="Folder of preprocessed scans to share between runs.")]
JsonOut = Annotated[Path | None, typer.Option("--json", help="Also write the figures to this file.")]


@app.command()
def check(study: StudyFile, overrides: Set = None) -> None:
    """Validate a study and print it in full, every default filled in, with its hash."""
    from ..privacy.study_file import describe, load_study

    print(describe(load_study(study, overrides or [])), end="")


@app.command()
def schema() -> None:
    """Print the JSON Schema of the study file, for editors."""
    from ..privacy.study_file import json_schema

    print(json.dumps(json_schema(), indent=2))


@app.command()
def run(
    study: StudyFile,
    sites: Sites,
    out: Out,
    overrides: Set = None,
    engine: Annotated[str, typer.Option(help="inprocess or ray.")] = "inprocess",
    workers: Workers = 0,
    resume: Resume = False,
    overwrite: Overwrite = False,
    cache: Cache = None,
    compare: cli_designs.Compare = "",
) -> None:
    """Run a study on the sites in a folder and write results.json, report.html and model.safetensors."""
    if engine not in ("inprocess", "ray"):
        raise typer.BadParameter(f'"{engine}": expected inprocess or ray', param_hint="--engine")
    from .run import Simulation

    loaded = _load(study, overrides)
    cli_designs.check_compare(compare, loaded)
    name: Engine = "ray" if engine == "ray" else "inprocess"
    _simulate(
        Simulation(study=loaded, sites=sites, out=out, cache=cache, engine=name, workers=workers), resume, overwrite
    )
    if compare:
        cli_designs.compare_run(loaded, sites, out, compare, workers)


@app.command()
def rehearse(
    study: StudyFile,
    sites: Sites,
    out: Out,
    overrides: Set = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port of the SuperLink; 0 takes a free one.")] = 0,
    resume: Resume = False,
    overwrite: Overwrite = False,
    cache: Cache = None,
) -> None:
    """Run a study over a real Flower deployment on 127.0.0.1: SuperLink with TLS, one node per site."""
    from .run import Simulation

    loaded = _load(study, overrides)
    _simulate(
        Simulation(study=loaded, sites=sites, out=out, cache=cache, engine="deployment", port=port), resume, overwrite
    )


def _load(study: Path, overrides: list[str] | None) -> "Study":
    from ..privacy.study_file import load_study

    return load_study(study, overrides or [])


def _simulate(simulation: "Simulation", resume: bool, overwrite: bool) -> None:
    from ..server.progress import RunProgress

    console = Console(stderr=True)
    if simulation.engine == "deployment":
        console.print("starting SuperLink and one node per site; this takes up to half a minute", highlight=False)
    with RunProgress(console, simulation.study.study.name) as progress:
        results = simulation.run(resume=resume, overwrite=overwrite, observer=progress)
    show(results, simulation.out)


def show(results: Mapping[str, Any], out: Path) -> None:
    """Print the result, held-out sites first."""
    from ..server.scores import price

    console = Console()
    if not console.is_terminal:
        console.width = 120
    title = f"round {results['selected_round']} of study {results['study_hash'][:12]}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    start = "before" if results["start"]["from"] else "untrained"
    for column in ("site", "role", "metric", "mean [95 % interval]", "patients", start, "privacy, per patient"):
        table.add_column(column, no_wrap=True)
    for name, site in sorted(results["sites"].items(), key=lambda item: (item[1]["role"] != "heldout", item[0])):
        paid = price(results["privacy"], name, heldout=site["role"] == "heldout")
        for metric, value in site["metrics"].items():
            low, high = value["ci95"]
            before = site["start"].get(metric)
            table.add_row(
                name,
                site["role"],
                metric,
                f"{value['mean']:.3f} [{low:.3f}, {high:.3f}]",
                str(value["n"]),
                f"{before['mean']:.3f}" if before else "",
                paid,
            )
    console.print(table)
    if results["start"]["from"]:
        console.print(f"before: {results['start']['title']}", highlight=False)
    console.print(f"report: {out / 'report.html'}", highlight=False, soft_wrap=True)


@app.command()
def phantoms(
    out: Out,
    sites: Annotated[int, typer.Option(min=1, max=100, help="Number of hospitals.")] = 5,
    patients: Annotated[int, typer.Option(min=1, max=10_000, help="Patients per hospital.")] = 40,
    seed: Annotated[int, typer.Option(min=0, help="Seed; a site is reproducible on its own.")] = 0,
    workers: Workers = 0,
    outcomes: Annotated[
        bool,
        typer.Option(
            "--outcomes",
            help="One glioma-like mass per patient, and an invented score and survival time that depend on its volume.",
        ),
    ] = False,
) -> None:
    """Make synthetic hospitals that look like brain MRI, from the ICBM152 tissue maps."""
    from .demo import make_phantoms
    from .phantoms.outcomes import add_outcomes

    require_folder(out)
    console = Console(stderr=True)
    names = [f"hospital-{i + 1}" for i in range(sites)]
    with Progress(console=console) as progress:
        kind = "mass" if outcomes else "blob"
        make_phantoms(
            out, dict.fromkeys(names, patients), seed=seed, workers=workers, progress=progress, lesion_kind=kind
        )
    for name in names if outcomes else ():
        add_outcomes(out / name, name=name, seed=seed)
    print(out)


@app.command()
def demo(
    out: Out = Path("out/demo"),
    workers: Workers = 0,
) -> None:
    """Train a federation of synthetic hospitals under differential privacy and judge it on a held-out one."""
    from .demo import run_demo

    show(run_demo(out, workers=workers, console=Console(stderr=True)), out)


@app.command()
def report(out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder of a run, finished or not.")]) -> None:
    """Write results.json, report.html and model.safetensors again from the saved state, also after a crash."""
    from .run import finish

    if cli_designs.is_design(out):
        cli_designs.rebuild(out)
        return
    show(cli_designs.finish_again(out) or finish(out), out)


@app.command("import-jpg")
def import_jpg(
    source: Annotated[Path, typer.Argument(help="Folder with index.csv and one folder of JPEG slices per class.")],
    out: Out,
    sites: Annotated[int, typer.Option(min=1, max=100, help="Number of simulated sites.")] = 4,
) -> None:
    """Turn classified 2D slices (brain_tumour_jpg) into simulated BIDS-like sites, split by block."""
    from .importers import import_tumour_jpg

    _print_sizes(import_tumour_jpg(source, out, sites=sites))


@app.command()
def split(
    source: Annotated[Path, typer.Argument(help="One BIDS data set.")],
    out: Out,
    sites: Annotated[int, typer.Option(min=2, max=100, help="Number of simulated sites.")] = 3,
) -> None:
    """Divide one BIDS data set into simulated sites, by a hash of the patient."""
    from .importers import split_site

    _print_sizes(split_site(source, out, sites=sites))


def _print_sizes(sizes: dict[str, int]) -> None:
    for name, count in sizes.items():
        print(f"{name}: {count} patients")


@privacy.command()
def plan(
    study: StudyFile,
    sites: Sites,
    out: Annotated[Path | None, typer.Option("--out", help="Folder for plan.png, plan.svg and plan.json.")] = None,
    overrides: Set = None,
    lifetime: Annotated[
        float | None, typer.Option("--lifetime", min=0.001, help="Budget of each data set over all studies.")
    ] = None,
    spent: Annotated[
        Path | None, typer.Option("--spent", help="Folder of an earlier run: what its sites' ledgers hold is spent.")
    ] = None,
) -> None:
    """Table and plot of ε against rounds, noise, signal, who runs out first, what a change would do."""
    from .planner import make_plan
    from .planner_words import show_plan, write_plan
    from .sites import find_sites, planned_settings

    loaded = _load(study, overrides)
    made = make_plan(loaded, planned_settings(loaded, find_sites(sites), spent=spent, lifetime=lifetime))
    console = Console()
    if not console.is_terminal:
        console.width = 140
    show_plan(made, console)
    if out is not None:
        write_plan(made, out)
        console.print(f"plot: {out / 'plan.png'}", highlight=False, soft_wrap=True)


@bench.command()
def overhead(json_out: JsonOut = None) -> None:
    """The same job as a plain PyTorch loop and through the in-process engine, side by side."""
    from .benchmarks.overhead import bench_overhead

    print(json.dumps(bench_overhead(json_out), indent=2))


@bench.command()
def rounds(
    json_out: JsonOut = None,
    count: Annotated[int, typer.Option("--rounds", min=2)] = 5,
    sites: Annotated[int, typer.Option("--sites", min=1, max=20, help="Hospitals.")] = 2,
    megabytes: Annotated[int, typer.Option("--megabytes", help="Of the model: 0 (that is 2 kB) or 5.")] = 0,
) -> None:
    """Seconds per round of a deployment without computation, stock Flower beside it."""
    from .benchmarks.rounds import NETWORKS, bench_rounds

    if megabytes not in NETWORKS:
        raise BadInput(f"--megabytes {megabytes}: expected one of {', '.join(map(str, NETWORKS))}")
    print(json.dumps(bench_rounds(json_out, count, hospitals=sites, megabytes=megabytes), indent=2))


@bench.command()
def dp(
    json_out: JsonOut = None,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Timed steps per arm.")] = 5,
    cuda: Annotated[bool, typer.Option("--cuda", help="On the GPU.")] = False,
) -> None:
    """A private training step beside a plain one and beside Opacus' three ways: time and memory."""
    from .benchmarks.dp import bench_dp

    print(json.dumps(bench_dp(json_out, repeats=repeats, device="cuda" if cuda else "cpu"), indent=2))


@bench.command()
def secagg(
    json_out: JsonOut = None,
    sites: Annotated[int, typer.Option("--sites", min=4, help="Hospitals.")] = 10,
    parameters: Annotated[int, typer.Option("--parameters", min=1, help="Trainable parameters.")] = 5_000_000,
) -> None:
    """One secure aggregation beside the same without masks, and with hospitals that drop out."""
    from .benchmarks.secagg import bench_secagg

    print(json.dumps(bench_secagg(json_out, sites=sites, parameters=parameters), indent=2))


@bench.command()
def utility(
    study: StudyFile,
    sites: Sites,
    out: Annotated[Path, typer.Option("--out", help="Folder of the runs; those that are complete stay.")],
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Runs of each private cell.")] = 1,
    json_out: JsonOut = None,
) -> None:
    """Held-out Dice over ε, trust model and start: what a promise to patients costs."""
    from .benchmarks.utility import bench_utility, markdown

    console = Console(stderr=True)
    found = bench_utility(study, sites, out, seeds=seeds, console=console, json_path=json_out)
    print(markdown(found["rows"]))


def main() -> None:
    """Entry point of the console command."""
    run_command(app)

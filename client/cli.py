# SPDX-License-Identifier: Apache-2.0
"""``fedneuro-node``: one hospital."""

from pathlib import Path
from typing import Annotated

import typer

from ..privacy.errors import BudgetExhausted
from ..privacy.exits import run_command
from . import cli_audit, cli_data, cli_enrol, cli_node, cli_policy, cli_predict

__all__ = ["app", "main"]

app = typer.Typer(
    name="fedneuro-node",
    help="Run a hospital's node: it computes only with the code that the hospital installed, and refuses "
    "studies that the hospital did not approve.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

cli_policy.add_commands(app)
cli_enrol.register(app)
app.add_typer(cli_audit.app, name="audit")
cli_node.add_commands(app)
cli_predict.register(app)
app.add_typer(cli_data.app, name="data")

Config = Annotated[Path, typer.Option("--config", help="The node's settings (node.toml).")]


@app.command()
def run(config: Config) -> None:
    """Serve studies beside a SuperNode until stopped: the hospital-owned runner."""
    from .node_settings import load_node_settings
    from .runner import serve

    serve(load_node_settings(config))


@app.command()
def check(
    data: Annotated[Path, typer.Argument(help="BIDS folder of the data set.")],
    study: Annotated[Path, typer.Option("--study", help="Study file (TOML).")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override a key; may repeat.")
    ] = None,
) -> None:
    """Check a data set against a study; nothing leaves. Exit code 2 if it may not join."""
    from ..privacy.study_file import load_study
    from .data import open_site

    loaded = load_study(study, overrides or [])
    site = open_site(data, loaded)
    for warning in site.warnings:
        print(f"warning: {warning}")
    for patient, why in site.excluded.items():
        print(f"excluded: {patient}: {why}")
    sides = f"{len(site.training())} to train, {len(site.validation())} to validate"
    print(f"{len(site.patients)} patients fit the study: {sides}")


@app.command()
def budget(
    config: Config,
    study: Annotated[
        Path | None, typer.Option("--study", help="Study file (TOML): what it would cost here, and whether it fits.")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override a key; may repeat.")
    ] = None,
) -> None:
    """Show what the privacy ledger says was spent, reserved and left. Exit code 3: changed ledger, or no room."""
    from ..privacy.study_file import load_study
    from .budget import plan_study, statement
    from .budget_words import plan_lines, show_statement
    from .node_settings import load_node_settings

    settings = load_node_settings(config).site_settings()
    loaded = load_study(study, overrides or []) if study else None
    show_statement(statement(settings), settings)
    if loaded is not None:
        plan = plan_study(settings, loaded)
        for line in plan_lines(plan, loaded):
            print(line)
        if not plan.fits:
            raise BudgetExhausted(
                f"study {loaded.study.name} ({loaded.hash[:12]}) does not fit: lower privacy.epsilon, take fewer "
                "rounds, or raise [budget] epsilon in node.toml"
            )


def main() -> None:
    """Entry point of the console command."""
    run_command(app)

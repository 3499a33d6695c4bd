# SPDX-License-Identifier: Apache-2.0
"""``fedneuro-server``: the coordinator."""

import json
import sys
from contextlib import closing
from pathlib import Path
from typing import Annotated

import typer

from ..privacy.exits import run_command
from . import cli_consortium, cli_dashboard, cli_data, cli_release, cli_runs, cli_sinks

__all__ = ["app", "main"]

app = typer.Typer(
    name="fedneuro-server",
    help="Coordinate a federated study: check its study file, and write its report at any time.\n\n"
    "A whole deployment on one machine: fedneuro-sim rehearse STUDY --sites DIR --out OUT",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

StudyFile = Annotated[Path, typer.Argument(metavar="STUDY", help="Study file (TOML).")]


@app.command()
def check(
    study: StudyFile,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override a key; may repeat.")
    ] = None,
) -> None:
    """Validate a study and print it in full, every default filled in, with its hash."""
    from ..privacy.study_file import describe, load_study

    print(describe(load_study(study, overrides or [])), end="")


@app.command()
def sign(
    study: StudyFile,
    key: Annotated[Path, typer.Option("--key", help="The coordinator's Ed25519 private key: ssh-keygen -t ed25519.")],
) -> None:
    """Sign a study, for hospitals whose policy approves what this key has signed."""
    from ..privacy.study_file import load_study
    from .study_signature import sign_files

    canonical, signature, public = sign_files(load_study(study), study, key)
    print(f"wrote {canonical} and {signature}")
    print(f"public key, for [[studies.rules]] coordinator in policy.toml: {public}")


@app.command()
def schema() -> None:
    """Print the JSON Schema of the study file, for editors."""
    from ..privacy.study_file import json_schema

    print(json.dumps(json_schema(), indent=2))


@app.command()
def report(out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder of a run, finished or not.")]) -> None:
    """Write results, report and signed manifest of a run from its saved state, also after a crash."""
    from .outcome import write_outcome
    from .saved_study import OLDER
    from .store import RunStore

    write_outcome(out)
    with closing(RunStore.load(out)) as store:
        if store.older:
            print(f"note: {out}: {OLDER}", file=sys.stderr)
    print(out / "report.html")


cli_consortium.register(app)
cli_runs.register(app)
cli_data.register(app)
cli_dashboard.register(app)
cli_release.register(app)
cli_sinks.register(app)


def main() -> None:
    """Entry point of the console command."""
    run_command(app)

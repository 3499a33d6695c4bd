# SPDX-License-Identifier: Apache-2.0
"""The command ``export``: runs that are on disk, into MLflow or TensorBoard."""

from pathlib import Path
from typing import Annotated

import typer

from ..privacy.errors import BadInput, EnvironmentProblem, FedNeuroError

__all__ = ["register"]


def export(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of runs, finished or not.")],
    mlflow: Annotated[
        str, typer.Option("--mlflow", metavar="URI", help="Tracking server (https://...), or a folder.")
    ] = "",
    tensorboard: Annotated[str, typer.Option("--tensorboard", metavar="DIR", help="Folder of event files.")] = "",
) -> None:
    """Write what runs have so far to MLflow or TensorBoard; again, and only what is new is added.

    `start` does so by itself, live, where [sinks] in server.toml says so.
    """
    from .run_folder import RunFolder
    from .sinks import Feed, open_sinks

    if not (mlflow or tensorboard):
        raise BadInput("nowhere to export to: give --mlflow URI, --tensorboard DIR, or both")
    if missing := [str(run) for run in runs if not (run / "state" / "run.db").is_file()]:
        raise BadInput(f"{missing[0]}: holds no run (state/run.db); give the folder that --out named, or DIR/runs/NAME")
    folders = [RunFolder(run.resolve()) for run in runs]
    sinks = open_sinks(mlflow, tensorboard, Path())
    feed = Feed(sinks, lambda: folders)
    for sink in sinks:
        try:
            count = feed.hand_all(sink)
            sink.close()
        except FedNeuroError:
            raise
        except Exception as error:  # whatever a foreign library raises
            text = " ".join(str(error).split())[:300]
            raise EnvironmentProblem(f"{sink.name} did not take the runs ({type(error).__name__}): {text}") from error
        print(f"{sink.name}: {count} run{'' if count == 1 else 's'}")


def register(app: typer.Typer) -> None:
    """Add the command to ``fedneuro-server``."""
    app.command()(export)

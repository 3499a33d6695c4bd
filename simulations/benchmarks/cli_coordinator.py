# SPDX-License-Identifier: Apache-2.0
"""``fedneuro-sim bench aggregation`` and ``chaos-run``: the coordinator with many hospitals, and under faults."""

import json
from pathlib import Path
from typing import Annotated

import typer

from ...privacy.errors import BadInput

__all__ = ["register"]

JsonOut = Annotated[Path | None, typer.Option("--json", help="Also write the figures to this file.")]


def aggregation(
    json_out: JsonOut = None,
    sites: Annotated[str, typer.Option("--sites", help="Numbers of hospitals.")] = "5,20,60",
    megabytes: Annotated[int, typer.Option("--megabytes", help="Of the model, roughly: 100, 20 or 5.")] = 100,
    count: Annotated[int, typer.Option("--rounds", min=2)] = 3,
) -> None:
    """The coordinator's memory and seconds per round with many hospitals, stock Flower beside it."""
    from .aggregation import CHANNELS, bench_aggregation

    try:
        numbers = tuple(int(number) for number in sites.split(","))
    except ValueError as error:
        raise BadInput(f"--sites {sites}: expected whole numbers, such as 5,20,60") from error
    if megabytes not in CHANNELS or min(numbers) < 1:
        raise BadInput(f"--megabytes {megabytes} --sites {sites}: expected 100, 20 or 5, and at least one hospital")
    print(json.dumps(bench_aggregation(json_out, sites=numbers, megabytes=megabytes, rounds=count), indent=2))


def chaos_run(
    json_out: JsonOut = None,
    kills: Annotated[
        int, typer.Option("--kills", min=1, help="Studies, one kill in each; 60 is the full version.")
    ] = 5,
    seed: Annotated[int, typer.Option("--seed", help="Of moments and hospitals.")] = 0,
) -> None:
    """A whole consortium whose processes are killed in the middle of studies: the same bits must come out."""
    from rich.console import Console

    from .chaos_run import bench_chaos_run

    console = Console(stderr=True)
    print(json.dumps(bench_chaos_run(json_out, kills=kills, seed=seed, tell=console.print), indent=2))


def register(bench: typer.Typer) -> None:
    """Add the commands to ``fedneuro-sim bench``."""
    bench.command()(aggregation)
    bench.command("chaos-run")(chaos_run)

# SPDX-License-Identifier: Apache-2.0
"""``fedneuro-sim bench chaos-node`` and ``soak``: a hospital's real node under faults, and over many rounds."""

import json
import math
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["register"]

JsonOut = Annotated[Path | None, typer.Option("--json", help="Also write the figures to this file.")]


def chaos_node(
    json_out: JsonOut = None,
    kills: Annotated[int, typer.Option("--kills", min=1, help="Faults in all; the kinds take turns.")] = 20,
    seed: Annotated[int, typer.Option("--seed", help="Of order, moments and lengths.")] = 0,
    shortest: Annotated[
        float, typer.Option("--shortest", min=1, help="Seconds of a cut, full disk, wrong clock, at least.")
    ] = 1.0,
    longest: Annotated[float, typer.Option("--longest", min=1, help="The same, at most.")] = 10.0,
    minutes: Annotated[float, typer.Option("--minutes", min=0, help="No fault begins later.")] = math.inf,
    kinds: Annotated[list[str] | None, typer.Option("--kind", help="Only this kind of fault; may repeat.")] = None,
) -> None:
    """A hospital's real node, killed, cut off, out of disk, with a wrong clock at random moments: it must come back."""
    from .chaos_node import KINDS, bench_chaos_node

    if unknown := sorted(set(kinds or ()) - set(KINDS)):
        raise typer.BadParameter(f"{unknown[0]}: expected one of {', '.join(KINDS)}", param_hint="--kind")
    from rich.console import Console

    console = Console(stderr=True)
    found = bench_chaos_node(
        json_out, kills=kills, seed=seed, shortest=shortest, longest=longest, kinds=tuple(kinds or KINDS),
        minutes=minutes, tell=console.print,
    )  # fmt: skip
    print(json.dumps(found, indent=2))


def soak(
    json_out: JsonOut = None,
    count: Annotated[int, typer.Option("--rounds", min=20)] = 300,
    private: Annotated[bool, typer.Option("--private", help="Private rounds, charged to the ledger.")] = False,
) -> None:
    """Memory of a node's processes, and seconds per round, over many rounds without work."""
    from .soak import bench_soak

    print(json.dumps(bench_soak(json_out, rounds=count, private=private), indent=2))


def register(bench: typer.Typer) -> None:
    """Add the commands to ``fedneuro-sim bench``."""
    bench.command("chaos-node")(chaos_node)
    bench.command()(soak)

# SPDX-License-Identifier: Apache-2.0
"""``fedneuro-server data-stats``: what hospitals released of their data sets, side by side."""

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["register"]


def data_stats(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Made by fedneuro-node data stats --release.")],
    json_out: Annotated[Path | None, typer.Option("--json", help="Also write everything to this file.")] = None,
) -> None:
    """Check what hospitals told of their data sets, and show it side by side."""
    from .data_statistics import beside_each_other, dumped, read_released, rows

    told = [read_released(path) for path in files]
    found = beside_each_other(told)
    for line in rows(told):
        print("  ".join(line))
    print(f"{found['patients']} patients (rounded) at {len(told)} hospitals")
    if json_out:
        json_out.write_text(dumped(found), encoding="utf-8")


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("data-stats")(data_stats)

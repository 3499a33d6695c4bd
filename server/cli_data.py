# SPDX-License-Identifier: Apache-2.0
"""``fedneuro-server data-stats``: what hospitals released of their data sets, side by side."""

from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = ["register"]


def data_stats(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Made by fedneuro-node data stats --release.")],
    json_out: Annotated[Path | None, typer.Option("--json", help="Also write everything to this file.")] = None,
) -> None:
    """Check what hospitals told of their data sets, and show it side by side."""
    from ..privacy.noised_statistics import Noised
    from .data_statistics import added_up, beside_each_other, dumped, noised_rows, read_released, rows

    told = [read_released(path) for path in files]
    plain, noised = [f for f in told if not isinstance(f, Noised)], [f for f in told if isinstance(f, Noised)]
    found: dict[str, Any] = {}
    if plain:
        found |= beside_each_other(plain)
        for line in rows(plain):
            print("  ".join(line))
        print(f"{found['patients']} patients (rounded) at {len(plain)} hospitals")
    if noised:
        found["noised"] = added_up(noised)
        for line in noised_rows(found["noised"]):
            print("  ".join(filter(None, line)))
        for name, site in found["noised"]["sites"].items():
            cost = f"ε = {site['epsilon']:g} at δ = {site['delta']:g}"
            print(f"{name}: public size {site['patients']}, cost {cost}, noise ±{site['noise']:.1f} patients per count")
    if json_out:
        json_out.write_text(dumped(found), encoding="utf-8")


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("data-stats")(data_stats)

# SPDX-License-Identifier: Apache-2.0
"""``fedneuro-sim bench metrics``."""

import json
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["register"]


def register(bench: typer.Typer) -> None:
    """Add the command to ``fedneuro-sim bench``."""

    @bench.command()
    def metrics(
        json_out: Annotated[Path | None, typer.Option("--json", help="Also write the figures to this file.")] = None,
        repeats: Annotated[int, typer.Option("--repeats", min=1, help="Timed calls of each arm.")] = 5,
    ) -> None:
        """Seconds of each metric of a 240 x 240 x 155 volume, beside MONAI and torchmetrics."""
        from .metrics import bench_metrics

        print(json.dumps(bench_metrics(json_out, repeats=repeats), indent=2))

# SPDX-License-Identifier: Apache-2.0
"""``fedneuro-node predict``: a released model on the hospital's own scans."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:  # these import torch, which --help does not need
    from ..models.spec import TaskSection
    from .predict import Prediction

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the command to ``fedneuro-node``."""
    app.command()(predict)


def predict(
    pack: Annotated[Path, typer.Argument(metavar="PACK", help="A release; or the folder of a finished run.")],
    data: Annotated[Path, typer.Option("--data", metavar="BIDS", help="Scans; only read. Masks are not needed.")],
    out: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="New folder of the predictions.")],
    key: Annotated[
        str | None,
        typer.Option("--key", metavar="PUB", help="The coordinator's public key, which must have signed."),
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Score against your own masks, or the column of participants.tsv.")
    ] = False,
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option("--device", help="auto: the GPU.")] = "auto",
) -> None:
    """Apply a released model to your own scans; nothing leaves. Exit code 3: the release is not as it was signed."""
    from ..privacy.release_pack import open_released
    from ..privacy.seals import public_key

    released = open_released(pack, key=public_key(key) if key else None)
    print(f"verified: {released.study.study.name}, signed {released.signed}")
    from .predict import NOTICE
    from .predict import predict as apply

    rows = apply(released, data, out, compare=compare, device=device, tell=lambda line: print(line, flush=True))
    scores = [row.dice["dice"] for row in rows if "dice" in row.dice]
    if scores:
        print(f"mean Dice {sum(scores) / len(scores):.3f} over {len(scores)} scans with masks of your own")
    elif compare:
        print(_compared(released.study.task, data, rows) or "nothing of your own to compare with: no mask, no column")
    print(f"{out}: {len(rows)} scans. {NOTICE}")


def _compared(task: "TaskSection", data: Path, rows: "Sequence[Prediction]") -> str:
    """Classes and outcomes against ``participants.tsv``, in a line; empty where there is nothing to compare."""
    from .agreement import agreement, known_of
    from .data.bids import read_participants

    if task.kind == "segmentation":
        return ""
    found: dict[str, list[list[float]]] = {}
    for row in rows:
        found.setdefault(row.scan.partition("_")[0], []).append([row.values[name] for name in task.outputs])
    return agreement(known_of(read_participants(data), list(found), task), found, task)

# SPDX-License-Identifier: Apache-2.0
"""``fedneuro-sim landmarks``, ``bench cache`` and ``bench fuzz``: the hospital's data path, off the hospital."""

import json
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["register"]

JsonOut = Annotated[Path | None, typer.Option("--json", help="Also write the figures to this file.")]


def landmarks(
    data: Annotated[Path, typer.Argument(metavar="DATASET", help="BIDS folder of public scans or phantoms.")],
    study: Annotated[Path, typer.Option("--study", help="Study file: its modalities and preprocessing.")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override a key; may repeat.")
    ] = None,
) -> None:
    """Learn the standard scale of data.normalise = "nyul" from public scans, as a line of the study file."""
    from ..privacy.study_words import toml_value
    from .landmarks import learn_landmarks

    scale, counts = learn_landmarks(data, study, overrides or [])
    print(
        f"# learned from {data.resolve().name}, scans: {', '.join(map(str, counts))}; never from patients of the study"
    )
    print(f"landmarks = {toml_value(scale)}")


def cache(
    json_out: JsonOut = None,
    patients: Annotated[int, typer.Option("--patients", min=2, help="Of the made-up data set.")] = 16,
    side: Annotated[int, typer.Option("--side", min=32, max=512, help="Voxels of an image along x and y.")] = 128,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Runs of each arm; medians are told.")] = 3,
) -> None:
    """Our cache of preprocessed scans beside MONAI's: building, reading, memory, and what training waits for."""
    from .benchmarks.cache import bench_cache

    print(json.dumps(bench_cache(json_out, patients=patients, side=side, repeats=repeats), indent=2))


def fuzz(
    reader: Annotated[str, typer.Option("--reader", help="nifti, dicom, or import (with dcm2niix).")] = "nifti",
    seconds: Annotated[float, typer.Option("--seconds", min=1, help="How long.")] = 600.0,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the changes.")] = 0,
    guided: Annotated[bool, typer.Option("--guided", help="By coverage, with atheris (pip install atheris).")] = False,
    keep: Annotated[Path | None, typer.Option("--keep", help="Folder for inputs that showed a fault.")] = None,
    seeds: Annotated[Path | None, typer.Option("--seeds", help="Folder of more sound files to start from.")] = None,
    json_out: JsonOut = None,
) -> None:
    """Feed broken files to the readers of scans. Exit code 1 if one did anything but refuse them in a line."""
    from .benchmarks.fuzz import READERS, bench_fuzz

    if reader not in READERS:
        raise typer.BadParameter(f"{reader}: expected one of {', '.join(READERS)}", param_hint="--reader")
    found = bench_fuzz(json_out, reader=reader, seconds=seconds, seed=seed, guided=guided, keep=keep, seeds=seeds)
    print(json.dumps(found, indent=2))
    if found["faults"]:
        raise typer.Exit(1)


def register(app: typer.Typer, bench: typer.Typer) -> None:
    """Add the commands."""
    app.command()(landmarks)
    bench.command()(cache)
    bench.command()(fuzz)

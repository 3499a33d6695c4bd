# SPDX-License-Identifier: Apache-2.0
"""The demonstration: synthetic hospitals, a private federation, and the same federation without privacy.

Nothing is downloaded. Four hospitals train, a fifth never does; the report opens with the fifth and shows the
private model beside the untrained network and beside the model that was trained without privacy.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from ..privacy.study import Study
from ..privacy.study_file import load_study
from ..server.progress import RunProgress
from .engines.inprocess import default_workers
from .phantoms import write_federation
from .run import Simulation

__all__ = ["DEMO_SITES", "STUDIES", "make_phantoms", "run_demo"]

STUDIES = Path(__file__).parent / "studies"
"""Folder of the example studies that come with the package."""

DEMO_SITES: Mapping[str, int] = {**{f"hospital-{i}": 120 for i in range(1, 5)}, "hospital-5": 30}
"""Hospitals of the demonstration and their numbers of patients; ``demo.toml`` holds out the last."""

DEMO_SEED = 1


def make_phantoms(
    out: Path,
    sites: Mapping[str, int],
    *,
    seed: int,
    workers: int,
    progress: Progress,
    modalities: Sequence[str] = ("FLAIR", "T1w"),
    lesion_kind: str = "blob",
) -> None:
    """Write synthetic hospitals into ``out``, unless just these are there already."""
    stamp = out / "phantoms.json"
    asked = {"sites": dict(sites), "seed": seed, "modalities": list(modalities)}
    wanted = json.dumps(asked | ({} if lesion_kind == "blob" else {"lesions": lesion_kind}), sort_keys=True)
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted:
        return
    for name in sites:
        if stamp.is_file() or not (out / name).exists():
            shutil.rmtree(out / name, ignore_errors=True)  # ours, of another seed or size
    stamp.unlink(missing_ok=True)
    task = progress.add_task("phantoms", total=sum(sites.values()))
    write_federation(
        out,
        sites=sites,
        seed=seed,
        modalities=modalities,
        lesion_kind=lesion_kind,
        workers=workers or default_workers(sum(sites.values()), 1),
        progress=lambda *_: progress.advance(task),
    )
    stamp.write_text(wanted, encoding="utf-8")


def run_demo(out: Path, *, workers: int, console: Console) -> dict[str, Any]:
    """Run the whole demonstration in ``out``; returns the results of the private federation."""
    study = load_study(STUDIES / "demo.toml")
    data = out / "data"
    console.print("1 of 3  synthetic hospitals")
    with Progress(console=console, transient=True) as progress:
        make_phantoms(
            data,
            DEMO_SITES,
            seed=DEMO_SEED,
            workers=workers,
            progress=progress,
            modalities=study.data.modalities,
        )
    console.print("2 of 3  the federation without privacy, to compare with")
    open_results = _run(without_privacy(study), data, out / "no-privacy", out / "cache", workers, console)
    console.print(f"3 of 3  the federation under differential privacy, ε ≤ {study.privacy.epsilon:g} for each patient")
    comparators = {"no-privacy": {"title": "same federation, no privacy", "sites": open_results["sites"]}}
    return _run(study, data, out, out / "cache", workers, console, comparators)


def without_privacy(study: Study) -> Study:
    """The same study with ``privacy.mode = "none"``: same data, network, rounds and steps."""
    values = study.model_dump(mode="json")
    values["study"]["name"] += "-no-privacy"
    values["privacy"]["mode"] = "none"
    values["training"] |= {"learning_rate": 0.3, "batch_size": 64}
    return Study.parse(values)


def _run(
    study: Study,
    data: Path,
    out: Path,
    cache: Path,
    workers: int,
    console: Console,
    comparators: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    simulation = Simulation(study=study, sites=data, out=out, cache=cache, workers=workers)
    with RunProgress(console, study.study.name) as progress:
        return simulation.run(overwrite=True, observer=progress, comparators=comparators)

# SPDX-License-Identifier: Apache-2.0
"""What a promise to patients costs in accuracy: held-out Dice over ε, trust model and start.

One study file, run once per cell of {no promise, local, distributed} × ε × {untrained, pre-trained on phantoms}
and seed. Each cell is a run in a folder of its own; what is complete is not run again, so a killed table goes
on where it stood. Pre-training and preprocessed scans are shared.

The two recipes below are set by rule, not tuned on the scores of this table: with tens of patients the noise of
a step outgrows its signal unless few parameters learn, so a pre-trained network trains its last layer
alone, with a step that keeps the random walk of the noise below the weights' own size.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from rich.console import Console

from ..run import Simulation

__all__ = ["EPSILONS", "Cell", "bench_utility", "markdown"]

EPSILONS = (1.0, 3.0, 8.0)

Start = Literal["untrained", "phantoms"]

STEPS = 100
"""Private steps of a site in every private cell."""

INIT: Mapping[str, str] = {
    "training.init.from": '"phantoms"',
    "training.init.steps": "450",
    "training.init.patients": "32",
    "training.init.lesions": '["mass", "mass", "mass", "blob"]',
}
"""Public pre-training, as in ``glioma-private.toml``."""

SCRATCH: Mapping[str, str] = {
    "training.optimizer": '"sgd"',
    "training.momentum": "0.8",
    "training.learning_rate": "0.5",
    "training.ema": "0.5",
    "privacy.clip": "0.2",
}
"""An untrained network: all parameters, the recipe of the demonstration."""

FINE_TUNE: Mapping[str, str] = {
    "training.optimizer": '"sgd"',
    "training.momentum": "0.0",
    "training.learning_rate": "0.02",
    "training.ema": "0.5",
    "training.trainable": '"head"',
    "privacy.clip": "1.0",
}
"""A pre-trained network: its last layer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One run of the table. ``epsilon`` is None without a promise."""

    mode: Literal["none", "local", "distributed"]
    epsilon: float | None
    start: Start
    seed: int

    @property
    def name(self) -> str:
        """Its folder."""
        promise = self.mode if self.epsilon is None else f"{self.mode}-{self.epsilon:g}"
        return f"{promise}-{self.start}-seed{self.seed}"

    def overrides(self) -> list[str]:
        """The study keys that make this cell, as ``--set`` takes them."""
        keys = {"study.seed": str(self.seed)}
        if self.start == "phantoms":
            keys |= INIT
        if self.epsilon is None:
            return [f"{key}={value}" for key, value in {**keys, "privacy.mode": '"none"'}.items()]
        keys |= SCRATCH if self.start == "untrained" else FINE_TUNE
        distributed = self.mode == "distributed"
        keys |= {
            "privacy.mode": f'"{self.mode}"',
            "privacy.epsilon": f"{self.epsilon:g}",
            "privacy.sample_rate": "0.5",
            "privacy.crops_per_patient": "4",
            "training.rounds": str(STEPS if distributed else STEPS // 10),
            "training.local_steps": "1" if distributed else "10",
            "evaluation.every": "20" if distributed else "2",
        }
        return [f"{key}={value}" for key, value in keys.items()]


def cells(epsilons: Sequence[float], seeds: int) -> Iterator[Cell]:
    """Every cell: the cheap private ones first, seed by seed, those without a promise last."""
    starts: tuple[Start, ...] = ("phantoms", "untrained")
    for seed in range(seeds):
        for start in starts:
            for epsilon in sorted(epsilons, reverse=True):
                yield Cell(mode="local", epsilon=epsilon, start=start, seed=seed)
                yield Cell(mode="distributed", epsilon=epsilon, start=start, seed=seed)
    for start in starts:
        yield Cell(mode="none", epsilon=None, start=start, seed=0)


def bench_utility(
    study: Path,
    sites: Path,
    out: Path,
    *,
    epsilons: Sequence[float] = EPSILONS,
    seeds: int = 1,
    console: Console | None = None,
    json_path: Path | None = None,
) -> dict[str, Any]:
    """Run the cells that are not there yet; returns (and saves) one row per cell.

    Args:
        study: study file; segmentation, with held-out sites.
        sites: folder of hospitals.
        out: folder of the runs.
        epsilons: budgets of the private cells.
        seeds: runs of each private cell.
        console: told of each finished cell.
        json_path: file of the figures.
    """
    from ...privacy.study_file import load_study

    rows: list[dict[str, Any]] = []
    for cell in cells(epsilons, seeds):
        folder = out / cell.name
        loaded = load_study(study, cell.overrides())
        results = _results(folder, loaded.hash)
        if results is None:
            simulation = Simulation(study=loaded, sites=sites, out=folder, cache=out / "cache")
            results = simulation.run(overwrite=True)
        rows.append(_row(cell, results))
        if console:
            last = rows[-1]
            console.print(f"{cell.name}: {last['mean']:.3f} {last['ci95']}, start {last['start_mean']:.3f}")
        if json_path:
            json_path.write_text(json.dumps({"rows": rows}, indent=2), encoding="utf-8")
    return {"rows": rows}


def _results(folder: Path, study_hash: str) -> dict[str, Any] | None:
    """What a complete run of this very study left, if it is there."""
    file = folder / "results.json"
    if not file.is_file():
        return None
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found if found["study_hash"] == study_hash and found["status"] == "complete" else None


def _row(cell: Cell, results: Mapping[str, Any]) -> dict[str, Any]:
    heldout = {name: site for name, site in results["sites"].items() if site["role"] == "heldout"}
    values = [site["metrics"]["dice"] for site in heldout.values()]
    starts = [site["start"]["dice"] for site in heldout.values() if site["start"].get("dice")]
    return {
        "mode": cell.mode,
        "epsilon": cell.epsilon,
        "start": cell.start,
        "seed": cell.seed,
        "mean": fmean(v["mean"] for v in values),
        "ci95": [fmean(v["ci95"][0] for v in values), fmean(v["ci95"][1] for v in values)],
        "n": sum(v["n"] for v in values),
        "start_mean": fmean(v["mean"] for v in starts) if starts else 0.0,
        "spent": results["privacy"]["epsilon"],
        "round": results["selected_round"],
        "seconds": results["seconds"],
    }


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table as ``docs/privacy.md`` holds it: mean over seeds, seeds' range, one run's interval over patients."""
    lines = [
        "| mode | ε | start | held-out Dice | seeds: lowest–highest | 95 % over patients |",
        "|---|---|---|---|---|---|",
    ]
    groups: dict[tuple[str, float | None, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["mode"], row["epsilon"], row["start"]), []).append(row)
    for (mode, epsilon, start), runs in groups.items():
        means = [run["mean"] for run in runs]
        low, high = runs[0]["ci95"]
        spread = f"{min(means):.3f}–{max(means):.3f}" if len(means) > 1 else "one seed"
        promise = "∞" if epsilon is None else f"{epsilon:g}"
        lines.append(f"| {mode} | {promise} | {start} | {fmean(means):.3f} | {spread} | {low:.3f}–{high:.3f} |")
    return "\n".join(lines)

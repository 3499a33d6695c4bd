# SPDX-License-Identifier: Apache-2.0
"""A finished run's folder without a round of training: real state, results, report and manifest of given weights."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedneuro.models.networks import build_network
from fedneuro.models.state import to_arrays
from fedneuro.privacy.study import Study
from fedneuro.server.events import Event
from fedneuro.server.manifest import write_manifest
from fedneuro.server.report import write_report
from fedneuro.server.results import write_results
from fedneuro.server.store import RoundRecord, RunStore, SiteRecord

__all__ = ["finished_run", "lively_arrays"]


def lively_arrays(study: Study) -> dict[str, Any]:
    """Untrained weights that call about half of the voxels foreground, so that predictions can differ."""
    network = build_network(
        study.model, in_channels=len(study.data.modalities), out_channels=study.task.channels, seed=5
    )
    with torch.no_grad():
        last = [parameter for name, parameter in network.named_parameters() if name.endswith("bias")][-1]
        last.zero_()
    return to_arrays(network)


def finished_run(out: Path, study: Study, *, finish: bool = True) -> Path:
    """Sites north and south train and west judges; south was lost in round 2, and east has not approved."""
    out.mkdir(parents=True, exist_ok=True)
    store = RunStore.create(out, study, engine="inprocess")
    sites = {
        name: SiteRecord(role="heldout" if name == "west" else "train", public_size=10, versions={"fedneuro": "0.1.0"})
        for name in ("north", "south", "west")
    }
    store.set_sites(sites)
    store.record(_refused("hello", 0, "east", "study-not-approved"))
    private = study.privacy.mode != "none"
    metric = "dice" if study.task.kind == "segmentation" else "accuracy"
    for number in range(3):
        there = [] if not number else ["north", "south"] if number == 1 else ["north"]
        record = RoundRecord(
            round=number,
            seconds=1.0,
            train={name: _trained(number, private=private) for name in there},
            refusals={"south": "lost"} if number == 2 else {},
        )
        arrays = lively_arrays(study) if number == 2 else {k: np.zeros_like(v) for k, v in lively_arrays(study).items()}
        store.save_round(record, {"model": arrays})
        if number == 2:
            store.record(_refused("train", 2, "south", "lost"))
            store.record(_refused("evaluate", 2, "south", "timeout"))
        judged = [name for name in sites if number < 2 or name != "south"]
        record.metrics = {name: {metric: {"mean": 0.1 * number, "ci95": [0.0, 0.3], "n": 10}} for name in judged}
        store.save_evaluation(record)
    if finish:
        store.finish({"selected_round": 2, "metrics": store.rounds()[-1].metrics})
    results = write_results(store)
    store.close()
    write_report(results, out / "report.html")
    write_manifest(out, results)
    return out


def _refused(during: str, number: int, site: str, reason: str) -> Event:
    return Event(kind="refused", round=number, site=site, values={"reason": reason, "during": during})


def _trained(number: int, *, private: bool) -> dict[str, Any]:
    return {
        "loss": None, "steps": 1, "seconds": 1.0, "attempt": 1,
        "epsilon": 1.5 * number if private else None, "noise_multiplier": 2.0 if private else None,
    }  # fmt: skip

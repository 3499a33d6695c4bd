# SPDX-License-Identifier: Apache-2.0
"""Run a study on one machine, with the same coordinator and the same hospitals as a deployment."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..models.heavy import torch
from ..privacy.errors import FedNeuroError
from ..privacy.folders import require_folder
from ..privacy.study import Study
from ..server.events import Observer, ignore
from ..server.outcome import write_outcome
from ..server.report_evidence import EVIDENCE
from ..server.rounds import run_study
from ..server.store import RunStore
from .engines.inprocess import InProcessTransport, default_workers
from .pretraining import initial_state
from .sites import faults, find_sites, site_settings

__all__ = ["Engine", "Simulation", "finish", "previews"]

Engine = Literal["inprocess", "ray", "deployment"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulation:
    """One study, its sites and where the results go.

    Args:
        study: the study.
        sites: folder that holds one BIDS folder per hospital, or the folders by the hospitals' names.
        out: folder of the results.
        cache: folder of preprocessed scans that several runs share; None: in ``out``.
        engine: ``inprocess``, ``ray``, or ``deployment`` (real SuperLink and SuperNode processes on loopback).
        workers: processes of the in-process engine and of Ray; 0: as many as sites and cores allow.
        port: ``deployment``: port of the SuperLink on 127.0.0.1; 0 takes a free one.
    """

    study: Study
    sites: Path | Mapping[str, Path]
    out: Path
    cache: Path | None = None
    engine: Engine = "inprocess"
    workers: int = 0
    port: int = 0

    def run(
        self,
        *,
        resume: bool = False,
        overwrite: bool = False,
        observer: Observer = ignore,
        comparators: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Run to the end, write results, model and report; returns the results.

        Raises:
            FedNeuroError: with the explanation of the simulated hospitals where one of them refused.
        """
        require_folder(self.out)
        settings = site_settings(self.study, self._found(), self.out, cache=self.cache)
        if resume:
            store = RunStore.resume(self.out, self.study, engine=self.engine)
        else:
            RunStore.refuse_to_replace(self.out, overwrite=overwrite)  # before minutes of pre-training
            initial = initial_state(self.study, (self.cache or self.out / "cache") / "pre-training", observer)
            store = RunStore.create(
                self.out,
                self.study,
                engine=self.engine,
                overwrite=overwrite,
                comparators=comparators,
                initial=initial,
            )
            shutil.rmtree(self.out / "sites", ignore_errors=True)
            (self.out / EVIDENCE).unlink(missing_ok=True)  # of an earlier model
        try:
            self._engine(settings, store, observer)
        except FedNeuroError as error:
            raise self._explained(error) from error
        finally:
            store.close()
        return finish(self.out)

    def _found(self) -> dict[str, Path]:
        return find_sites(self.sites) if isinstance(self.sites, Path) else dict(self.sites)

    def _engine(self, settings: Any, store: RunStore, observer: Observer) -> None:
        if self.engine == "inprocess":
            torch.set_num_threads(self.study.training.threads)
            workers = self.workers or default_workers(len(settings), self.study.training.threads)
            with InProcessTransport(settings, workers=workers) as transport:
                run_study(self.study, transport, store, observer)
        elif self.engine == "ray":
            from .engines.ray import run_ray

            run_ray(self.study, settings, store, observer, workers=self.workers)
        else:
            from .rehearsal import rehearse

            rehearse(self.study, settings, store, observer, port=self.port)

    def _explained(self, error: FedNeuroError) -> FedNeuroError:
        """The error with the hospitals' own words, which a simulation may show: the data are the user's."""
        found = faults(self.out)
        if not found:
            return error
        text = "\n".join(fault["text"] for fault in found)
        explained = type(error)(f"{text}\n{error}", reason=error.reason)
        # A fault of the input is the user's to mend, whatever the quorum rule made of it.
        explained.exit_code = max(f["exit_code"] for f in found) or error.exit_code  # type: ignore[misc]
        return explained


def finish(out: Path) -> dict[str, Any]:
    """Write ``results.json``, ``model.safetensors``, ``report.html`` and ``manifest.json`` from the saved state."""
    return write_outcome(out, previews=previews(out))


def previews(out: Path) -> dict[str, list[dict[str, Any]]]:
    """Pictures that simulated hospitals made of their own patients; a real deployment has none here."""
    import json

    found: dict[str, list[dict[str, Any]]] = {}
    for index in sorted((out / "sites").glob("*/previews/index.json")):
        entries = json.loads(index.read_text(encoding="utf-8"))
        found[index.parent.parent.name] = [{**entry, "file": index.parent / entry["file"]} for entry in entries]
    return found

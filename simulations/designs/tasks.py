# SPDX-License-Identifier: Apache-2.0
"""Units of work of a design: a run in a folder of its own, or a model judged at sites. Each knows whether it is done.

A task that was killed goes on where its folder stands, so a design is started again with the same command.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ...client.patient_scores import FILE
from ...client.settings import SiteSettings
from ...models.state import digest, load_saved
from ...privacy.contract import Arrays, EvaluateReply, Request
from ...privacy.errors import DataError, FedNeuroError, StudyError
from ...privacy.study import Study
from ...server.events import Observer, ignore
from ...server.start import initial_arrays
from ..comparators import scoring_study
from ..pretraining import initial_state
from ..sites import faults, site_settings

__all__ = ["RunTask", "ScoreTask", "Task", "read_results"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunTask:
    """A study on sites, in ``folder``."""

    name: str
    study: Study
    sites: Mapping[str, Path]
    folder: Path

    def done(self) -> bool:
        """Whether a complete run of this very study is there."""
        found = read_results(self.folder)
        return found is not None and found["study_hash"] == self.study.hash and found["status"] == "complete"

    def perform(self, *, cache: Path, workers: int, observer: Observer = ignore) -> None:
        """Run, or go on with, the study.

        Raises:
            FedNeuroError: it cannot be run.
        """
        from ..run import Simulation

        simulation = Simulation(study=self.study, sites=self.sites, out=self.folder, cache=cache, workers=workers)
        resume = self._resumable()
        simulation.run(resume=resume, overwrite=not resume, observer=observer)

    def _resumable(self) -> bool:
        from ...server.store import RunStore

        try:
            store = RunStore.load(self.folder)
        except FedNeuroError:
            return False
        try:
            return bool(store.study.hash == self.study.hash and store.rounds())
        finally:
            store.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreTask:
    """A model judged on all patients of sites, each patient's values kept in ``folder/sites/<name>``.

    ``source`` is what ``model`` names: a run's folder, a file, or the study's start (``model`` is then not read).
    """

    name: str
    study: Study
    sites: Mapping[str, Path]
    folder: Path
    source: Literal["run", "file", "start"]
    model: Path

    def done(self) -> bool:
        """Whether this very model was judged at every site."""
        if self.source == "start":
            wanted = None  # the study decides it, and pre-training is deterministic
        else:
            try:
                wanted = digest(load_saved(self._file())[0])
            except (OSError, ValueError):
                return False
        hash_ = self._scoring().hash
        for site in self.sites:
            try:
                found = json.loads((self.folder / "sites" / site / FILE).read_text(encoding="utf-8"))
                if found["study_hash"] != hash_ or (wanted and found["model_digest"] != wanted):
                    return False
            except (OSError, ValueError, KeyError, TypeError):
                return False
        return True

    def perform(self, *, cache: Path, workers: int, observer: Observer = ignore) -> None:
        """Judge the model.

        Raises:
            FedNeuroError: the model is not of this network, or a site cannot be read.
        """
        from ..engines.inprocess import InProcessTransport

        study = self._scoring()
        arrays = self._arrays(cache, observer)
        settings: dict[str, SiteSettings] = site_settings(study, dict(self.sites), self.folder, cache=cache)
        requests = {
            name: Request(kind="evaluate", study=study, round=0, arrays=arrays, final=True) for name in settings
        }
        with InProcessTransport(settings, workers=workers) as transport:
            replies = list(transport.exchange(requests, study.strategy.round_timeout))
        lost = [reply.site for reply in replies if not isinstance(reply, EvaluateReply)]
        if lost:
            texts = [fault["text"] for fault in faults(self.folder) if fault["site"] in lost]
            raise DataError("\n".join(texts) or f"{self.name}: {', '.join(lost)} could not be judged; run again")

    def _scoring(self) -> Study:
        return scoring_study(self.study, list(self.sites))

    def _file(self) -> Path:
        return self.model / "model.safetensors" if self.source == "run" else self.model

    def _arrays(self, cache: Path, observer: Observer) -> Arrays:
        if self.source == "start":
            found = initial_state(self.study, cache / "pre-training", observer)
            return initial_arrays(self.study)["model"] if found is None else found
        try:
            return load_saved(self._file())[0]
        except (OSError, ValueError) as error:
            raise StudyError(
                f"{self._file()}: cannot be read as a model ({error}); expected a model.safetensors that a run wrote"
            ) from error


Task = RunTask | ScoreTask


def read_results(folder: Path) -> dict[str, Any] | None:
    """``results.json`` of a run; None where there is none, it was cut, or it is of another schema."""
    try:
        found = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    good = isinstance(found, dict) and found.get("schema_version") == 1 and "study_hash" in found
    return found if good and "status" in found else None

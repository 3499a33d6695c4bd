# SPDX-License-Identifier: Apache-2.0
"""MLflow tracking: one MLflow run per run, in the experiment of its study's name.

``mlflow-skinny`` is enough: it speaks to a tracking server and writes folders. A name and a password for a server come
from ``MLFLOW_TRACKING_USERNAME`` and ``MLFLOW_TRACKING_PASSWORD`` (or ``MLFLOW_TRACKING_TOKEN``) of ``start``, never
from ``server.toml``. MLflow's own telemetry is turned off: a coordinator's machine tells nobody what it does.
"""

import os
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from ...privacy.study import Study
from ..run_view import RunView

__all__ = ["MlflowSink"]

STATUS: Final = {"complete": "FINISHED", "stopped": "KILLED"}
"""Of a run that is not under way; any other: FAILED."""
_ENDED, _ROUND, _RUN = "fedneuro.ended", "fedneuro.round", "fedneuro.run"


class MlflowSink:
    """Writes to one tracking server or folder.

    Args:
        where: ``https://…``, another address that MLflow knows, or a folder.
    """

    name = "MLflow"

    def __init__(self, where: str) -> None:
        os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # the feed tries again
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        if "://" not in where:
            os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"  # MLflow wants to be asked, as a database is faster
            where = Path(where).absolute().as_uri()
        from mlflow import MlflowClient
        from mlflow.entities import Metric

        self._client: Any = MlflowClient(tracking_uri=where)
        self._metric: Any = Metric
        self._runs: dict[str, str] = {}

    def begin(self, view: RunView, study: Study) -> int:
        """Find the run again by its name and its study's hash, or make it."""
        experiment, tags = self._experiment(study.study.name), {_RUN: view.name, "fedneuro.study": study.hash}
        query = " and ".join(f"tags.`{name}` = {_quoted(value)}" for name, value in tags.items())
        known = self._client.search_runs([experiment], filter_string=query, max_results=1)
        if known:
            self._runs[view.name] = known[0].info.run_id
            if view.is_live:
                self._client.update_run(known[0].info.run_id, status="RUNNING")
                self._client.set_tag(known[0].info.run_id, _ENDED, "")
            return int(known[0].data.tags.get(_ROUND, -1))
        began = round(1000 * (view.plan.launched or view.updated or time.time()))
        made = self._client.create_run(experiment, start_time=began, tags=tags, run_name=view.name)
        self._runs[view.name] = made.info.run_id
        facts: dict[str, object] = {
            "model": study.model.name, "privacy": study.privacy.mode, "rounds": study.training.rounds,
            "seed": study.study.seed, "strategy": study.strategy.name,
        }  # fmt: skip
        if study.privacy.mode != "none":
            facts["epsilon"] = study.privacy.epsilon
        for name, value in facts.items():
            self._client.log_param(made.info.run_id, name, value)
        return -1

    def round(self, run: str, number: int, values: Mapping[str, float]) -> None:
        """One request for all values of a round."""
        self._write(run, values, number)
        self._client.set_tag(self._runs[run], _ROUND, str(number))

    def end(self, view: RunView, values: Mapping[str, float], files: Sequence[Path]) -> None:
        """Final values, files, and how it ended."""
        run = self._runs[view.name]
        if self._client.get_run(run).data.tags.get(_ENDED) == view.status:
            return  # this process was started again
        self._write(view.name, values, view.selected_round or view.round)
        for path in files:
            self._client.log_artifact(run, str(path))
        self._client.set_terminated(run, STATUS.get(view.status, "FAILED"), round(1000 * view.updated) or None)
        self._client.set_tag(run, _ENDED, view.status)

    def close(self) -> None:
        """MLflow keeps nothing open."""

    def _experiment(self, name: str) -> str:
        known = self._client.get_experiment_by_name(name)
        return str(known.experiment_id if known else self._client.create_experiment(name))

    def _write(self, run: str, values: Mapping[str, float], step: int) -> None:
        now = round(1000 * time.time())
        metrics = [self._metric(_safe(name), value, now, step) for name, value in values.items()]
        if metrics:
            self._client.log_batch(self._runs[run], metrics=metrics)


def _quoted(text: str) -> str:
    """A string of MLflow's search; a run's folder may have any name."""
    return f'"{text}"' if "'" in text else f"'{text}'"


def _safe(name: str) -> str:
    """A name with what MLflow admits in one: a hospital must not be able to end the sink with its own."""
    return re.sub(r"[^A-Za-z0-9_./ -]", "_", name)[:250]

# SPDX-License-Identifier: Apache-2.0
"""Runs in MLflow and TensorBoard: what arrives there, once each, also after a restart and a sink that was away."""

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fedneuro.privacy.errors import BadInput, EnvironmentProblem
from fedneuro.privacy.study import Study
from fedneuro.server import cli
from fedneuro.server.consortium_settings import ServerSettings, load_server_settings
from fedneuro.server.events import Event
from fedneuro.server.run_folder import run_folders
from fedneuro.server.run_view import RunView
from fedneuro.server.sinks import Feed, Sink, feed, open_sinks
from tests.server.staged import Staged

SITES = {"HT": "heldout", "CS": "train", "DU": "train"}
PRIVATE: dict[str, dict[str, object]] = {"privacy": {"mode": "local", "epsilon": 8.0}}


class Listener:
    """A sink that remembers, and can be away."""

    name = "listener"

    def __init__(self, known: int = -1) -> None:
        self.known, self.away = known, False
        self.rounds: list[tuple[int, dict[str, float]]] = []
        self.ended: list[tuple[str, dict[str, float], list[str]]] = []

    def begin(self, view: RunView, study: Study) -> int:
        assert view.name.startswith(study.study.name)
        return self.known

    def round(self, run: str, number: int, values: Mapping[str, float]) -> None:
        if self.away:
            raise ConnectionError(f"{run} cannot be told")
        self.rounds.append((number, dict(values)))

    def end(self, view: RunView, values: Mapping[str, float], files: Sequence[Path]) -> None:
        self.ended.append((view.status, dict(values), [path.name for path in files]))

    def close(self) -> None:
        pass


def staged(runs: Path) -> Staged:
    run = Staged(runs, SITES, **PRIVATE, strategy={"min_sites": 1})
    run.begin()
    return run


def finish(run: Staged) -> None:
    """The final evaluation, and a report."""
    run.tell(
        Event(kind="evaluated", round=2, site="HT", values={"metrics": {"dice": 0.75}, "final": True}),
        Event(kind="finished", values={"selected_round": 2}),
    )
    (run.folder.path / "report.html").write_text("<p>report</p>")


def feed_of(runs: Path, *sinks: Sink) -> Feed:
    return Feed(sinks, lambda: run_folders(runs))


def test_each_round_once_and_what_was_missed_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, listener, away = staged(tmp_path), Listener(), Listener()
    away.name, away.away = "away", True
    monkeypatch.setattr(feed, "FIRST_PAUSE", 0.0)
    feeding = feed_of(tmp_path, away, listener)
    with run.folder.hold():
        run.round(1)
        run.start_round(2)
        run.train(2, "CS")
        feeding.look()
        feeding.look()
        assert listener.rounds == [
            (1, {
                "heldout/HT/dice": pytest.approx(0.5), "privacy/CS/epsilon": 0.9, "privacy/DU/epsilon": 0.9,
                "round/seconds": 3.0, "round/sites": 2.0, "train/CS/dice": pytest.approx(0.49),
                "train/DU/dice": pytest.approx(0.48),
            })
        ]  # fmt: skip
        assert next(iter(listener.rounds[0][1])) == "heldout/HT/dice"  # first in a list by name
        run.round(2, DU="timeout")
        feeding.look()
    assert [number for number, _ in listener.rounds] == [1, 2] and listener.ended == [] and away.rounds == []
    finish(run)
    away.away = False
    feeding.look()
    feeding.look()
    final = {"final/heldout/HT/dice": 0.75, "final/selected_round": 2.0}
    for sink in (listener, away):
        assert [number for number, _ in sink.rounds] == [1, 2] and len(sink.ended) == 1
        status, values, files = sink.ended[0]
        assert status == "complete" and files == ["report.html"] and final.items() <= values.items()
    again = Listener(known=1)  # after a restart of the process
    feed_of(tmp_path, again).look()
    assert [number for number, _ in again.rounds] == [2] and len(again.ended) == 1


def test_a_run_in_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow", reason="mlflow-skinny is not installed (pip install 'fedneuro[sinks]')")
    monkeypatch.chdir(tmp_path)
    run = staged(tmp_path / "runs")
    (sink,) = open_sinks("mlruns", "", tmp_path)
    feeding = feed_of(tmp_path / "runs", sink)
    with run.folder.hold():
        run.round(1)
        feeding.hand_all(sink)
        client: Any = mlflow.MlflowClient(tracking_uri=(tmp_path / "mlruns").as_uri())
        experiment = client.get_experiment_by_name(run.study.study.name).experiment_id
        assert [found.info.status for found in client.search_runs([experiment])] == ["RUNNING"]
        run.round(2)
    finish(run)
    for _ in range(2):  # another process each time
        (sink,) = open_sinks("mlruns", "", tmp_path)
        feed_of(tmp_path / "runs", sink).hand_all(sink)
    (found,) = client.search_runs([experiment])
    assert found.info.status == "FINISHED" and found.info.run_name == run.folder.name
    assert found.data.params["epsilon"] == "8.0" and found.data.tags["fedneuro.study"] == run.study.hash
    for name, values in {"heldout/HT/dice": [0.5, 0.6], "privacy/CS/epsilon": [0.9, 1.8]}.items():
        history = client.get_metric_history(found.info.run_id, name)
        assert [(point.step, point.value) for point in history] == [
            (1, pytest.approx(values[0])),
            (2, pytest.approx(values[1])),
        ]
    assert [point.value for point in client.get_metric_history(found.info.run_id, "final/heldout/HT/dice")] == [0.75]
    assert [file.path for file in client.list_artifacts(found.info.run_id)] == ["report.html"]


def test_a_run_in_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX", reason="tensorboardX is not installed (pip install 'fedneuro[sinks]')")
    run = staged(tmp_path / "runs")
    run.round(1)
    run.round(2)
    finish(run)
    for _ in range(2):  # written anew by another process, and not twice
        done = CliRunner().invoke(
            cli.app, ["export", str(run.folder.path), "--tensorboard", str(tmp_path / "tb")], standalone_mode=False
        )
        assert done.exit_code == 0 and "TensorBoard: 1 run" in done.output, done.exception
    found = scalars(tmp_path / "tb" / run.folder.name)
    assert [step for step, _ in found["heldout/HT/dice"]] == [1, 2]
    assert [value for _, value in found["heldout/HT/dice"]] == pytest.approx([0.5, 0.6])
    assert found["final/heldout/HT/dice"] == [(2, 0.75)] and len(found["privacy/CS/epsilon"]) == 2


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Steps and values by name, from TensorBoard's event files (TFRecord frames: length, CRC, content, CRC)."""
    from tensorboardX.proto.event_pb2 import Event as Record  # pyright: ignore[reportAttributeAccessIssue]

    found: dict[str, list[tuple[int, float]]] = {}
    for path in sorted(folder.glob("events.out.tfevents.*")):
        content, place = path.read_bytes(), 0
        while place < len(content):
            (length,) = struct.unpack_from("<Q", content, place)
            record = Record.FromString(content[place + 12 : place + 12 + length])
            place += length + 16
            for value in record.summary.value:
                if value.HasField("simple_value"):
                    found.setdefault(value.tag, []).append((record.step, value.simple_value))
    return found


def test_what_is_wrong_is_said_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed, "find_spec", lambda _: None)
    for key, package in (("mlflow", "mlflow-skinny"), ("tensorboard", "tensorboardX")):
        with pytest.raises(EnvironmentProblem, match=rf"sinks.{key} needs the package {package}: pip install"):
            open_sinks(**{"mlflow": "", "tensorboard": "", key: "x"}, home=tmp_path)
    for words, said in (
        (["export", str(tmp_path)], "nowhere to export"),
        (["export", str(tmp_path), "--mlflow", "m"], "holds no run"),
    ):
        done = CliRunner().invoke(cli.app, words, standalone_mode=False)
        assert isinstance(done.exception, BadInput) and said in str(done.exception)
    basic = '[consortium]\nname = "t"\n[server]\nhost = "h"\n[sinks]\n'
    (tmp_path / "server.toml").write_text(f'{basic}mlflow = "https://me:secret@mlflow.example"\n')
    with pytest.raises(BadInput, match="set MLFLOW_TRACKING_USERNAME") as refused:
        load_server_settings(tmp_path / "server.toml")
    assert "\n" not in str(refused.value) and "secret" not in str(refused.value)
    assert not ServerSettings.model_validate({"consortium": {"name": "t"}, "server": {"host": "h"}}).sinks.any

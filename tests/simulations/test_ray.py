# SPDX-License-Identifier: Apache-2.0
"""Flower's simulation on Ray: the bits of the in-process engine, errors as they are, and nothing left behind."""

import os
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from fedneuro.models.state import digest
from fedneuro.privacy.errors import StudyError
from fedneuro.privacy.study import Study
from fedneuro.server.events import Event, ignore
from fedneuro.server.rounds import run_study
from fedneuro.server.store import RunStore
from fedneuro.simulations.benchmarks.rounds import write_tiny_site
from fedneuro.simulations.engines.inprocess import InProcessTransport
from fedneuro.simulations.engines.ray import run_ray
from fedneuro.simulations.sites import find_sites, site_settings
from tests.bids import make_study

pytestmark = [pytest.mark.deployment, pytest.mark.usefixtures("alone_with_ray")]


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hospitals")
    for seed, name in enumerate(("east", "north", "south")):
        write_tiny_site(folder / name, seed=seed)
    return folder


def study_of(rounds: int, *heldout: str) -> Study:
    training = {"rounds": rounds, "local_steps": 2, "local_epochs": 0, "batch_size": 2, "threads": 1, "device": "cpu"}
    evaluation = {"every": 1, "bootstrap": 100, "previews": 0, "heldout": heldout}
    return make_study(training=training, evaluation=evaluation, data={"augment": "light"})


def on_ray(
    study: Study, sites: Path, out: Path, observer: Callable[[Event], None] = ignore, workers: int = 2
) -> RunStore:
    store = RunStore.create(out, study, engine="ray")
    run_ray(study, site_settings(study, find_sites(sites), out), store, observer, workers=workers)
    return store


def assert_nothing_left() -> None:
    names = [process.name() for process in psutil.Process().children(recursive=True)]
    assert not [name for name in names if "ray" in name or "gcs_server" in name]
    assert not list(Path(tempfile.gettempdir()).glob("fn-ray-*"))


@pytest.mark.walk
def test_ray_gives_the_bits_of_the_in_process_engine(
    sites: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Three sites share two workers, so each site's state moves between processes."""
    study = study_of(3, "east")
    ray = on_ray(study, sites, tmp_path / "ray")
    assert_nothing_left()
    written = capfd.readouterr()
    assert written.out == ""
    assert "DEPRECATED" not in written.err
    local = RunStore.create(tmp_path / "local", study, engine="inprocess")
    with InProcessTransport(site_settings(study, find_sites(sites), tmp_path / "local")) as transport:
        run_study(study, transport, local, ignore)
    for number in (2, 3):
        assert digest(ray.groups(number)["model"]) == digest(local.groups(number)["model"])
    assert ray.final() == local.final()
    assert [r.metrics for r in ray.rounds()] == [r.metrics for r in local.rounds()]
    assert all(record.refusals == {} for record in ray.rounds())


def test_an_error_and_ctrl_c_come_out_as_they_are(sites: Path, tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"evaluation\.heldout names nowhere"):
        on_ray(study_of(1, "nowhere"), sites, tmp_path / "error", workers=1)
    assert_nothing_left()

    def observe(event: Event) -> None:
        if event.kind == "round-done":
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        on_ray(study_of(100), sites, tmp_path / "stopped", observe, workers=1)
    assert_nothing_left()
    store = RunStore.load(tmp_path / "stopped")
    assert store.status == "running"  # resumable
    assert store.rounds()[-1].round < 100

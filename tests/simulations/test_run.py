# SPDX-License-Identifier: Apache-2.0
"""The in-process engine: equal to a loop written by hand, whatever the workers, also after kill -9 and Ctrl-C."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from jsonschema import validate

from fedneuro.client.data import Crops, open_site
from fedneuro.client.session import stream
from fedneuro.models.losses import build_loss
from fedneuro.models.networks import build_network
from fedneuro.models.state import load_arrays, load_saved, to_arrays
from fedneuro.privacy.errors import DataError, FedNeuroError
from fedneuro.privacy.study import Study
from fedneuro.privacy.study_file import describe
from fedneuro.simulations.run import Simulation
from tests.bids import FAULTS, make_study, write_site

ROOT = Path(__file__).parents[2]


@pytest.fixture
def sites(tmp_path: Path) -> Path:
    return write_sites(tmp_path / "sites")


def write_sites(folder: Path) -> Path:
    for index, name in enumerate(("north", "south", "west")):
        write_site(folder / name, patients=6, shape=(18, 18, 4), seed=index)
    return folder


def small_study(**sections: Any) -> Study:
    return make_study(
        **{
            "study": {"name": "small", "seed": 3},
            "training": {"rounds": 3, "local_epochs": 1, "batch_size": 2},
            "evaluation": {"heldout": ["west"], "bootstrap": 100, "validation_fraction": 0.4},
            "data": {"patch": [16, 16], "augment": "light"},
            **sections,
        }
    )


def simulate(study: Study, sites: Path, out: Path, **options: Any) -> tuple[dict[str, Any], dict[str, bytes]]:
    run = {k: options.pop(k) for k in ("resume", "overwrite") if k in options}
    results = Simulation(study=study, sites=sites, out=out, **options).run(**run)
    return results, model_bytes(out)


def model_bytes(out: Path) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in load_saved(out / "model.safetensors")[0].items()}


def test_equals_a_loop_written_by_hand(tmp_path: Path, sites: Path) -> None:
    """FedAvg with Adam kept at each site, on the same crops: the same bits as the engine."""
    study = small_study(evaluation={"heldout": ["west"], "every": 0, "validation_fraction": 0.3})
    _, found = simulate(study, sites, tmp_path / "out", workers=1)

    torch.set_num_threads(1)
    loss_of = build_loss(study.training.loss, study.task)
    network = build_network(study.model, in_channels=1, out_channels=2, seed=study.study.seed)
    state = to_arrays(network)
    clients = {}
    for name in ("north", "south"):
        data = open_site(sites / name, study)
        own = build_network(study.model, in_channels=1, out_channels=2, seed=0)
        crops = Crops(data, data.training(), study)
        clients[name] = (own, crops, torch.optim.Adam(own.parameters(), study.training.learning_rate))
    for number in range(1, 4):
        states = []
        for name, (own, crops, optimizer) in clients.items():
            load_arrays(own, state)
            for images, labels in crops.epoch(2, stream(study, name, number, "batches")):
                optimizer.zero_grad()
                loss_of(own(images), labels).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
            states.append(to_arrays(own))
        # Both sites declare five patients, so the mean is the plain one; float64 makes the sum of two exact.
        state = {k: (np.add(*(s[k] for s in states), dtype=np.float64) / 2).astype(np.float32) for k in state}
    assert {k: v.tobytes() for k, v in state.items()} == found


def test_workers_change_no_bit_and_state_lives_on(tmp_path: Path, sites: Path) -> None:
    """Two workers for three sites; Adam's state is kept, so starting it anew must give other bits."""
    one, bits = simulate(small_study(), sites, tmp_path / "one", workers=1)
    two, bits_two = simulate(small_study(), sites, tmp_path / "two", workers=2)
    assert bits == bits_two
    assert one["sites"] == two["sites"]
    training = {"rounds": 3, "local_epochs": 1, "batch_size": 2, "optimizer_state": "reset"}
    assert simulate(small_study(training=training), sites, tmp_path / "reset", workers=1)[1] != bits


def test_results_follow_their_schema(tmp_path: Path, sites: Path) -> None:
    results, _ = simulate(small_study(), sites, tmp_path / "out")
    validate(
        json.loads((tmp_path / "out/results.json").read_text()),
        json.loads((ROOT / "docs/results.schema.json").read_text()),
    )
    west = results["sites"]["west"]
    assert west["role"] == "heldout" and west["metrics"]["dice"]["n"] == west["public_size"] == 5
    low, high = west["metrics"]["dice"]["ci95"]
    assert low <= west["metrics"]["dice"]["mean"] <= high
    assert results["privacy"]["mode"] == "none" and results["privacy"]["epsilon"] == {}
    page = (tmp_path / "out/report.html").read_text()
    assert page.count("data:image/png;base64") == len(list((tmp_path / "out/sites").glob("*/previews/*.png"))) >= 3


def test_private_run_reports_epsilon_and_never_repeats_its_noise(tmp_path: Path, sites: Path) -> None:
    study = small_study(
        training={"rounds": 2, "local_steps": 2, "local_epochs": 0, "optimizer": "sgd", "learning_rate": 0.1},
        privacy={"mode": "local", "epsilon": 4.0, "delta": 1e-2, "sample_rate": 0.5, "crops_per_patient": 2},
    )
    first, bits = simulate(study, sites, tmp_path / "a", workers=1)
    _, other = simulate(study, sites, tmp_path / "b", workers=1)
    assert bits != other
    assert set(first["privacy"]["epsilon"]) == {"north", "south"}
    for epsilon in first["privacy"]["epsilon"].values():
        assert 3.5 < epsilon <= 4.0 * (1 + 1e-6)
    assert all(site["loss"] is None for r in first["rounds"] for site in r["train"].values())


def test_retried_private_round_is_charged_and_budget_ends_the_run(tmp_path: Path, sites: Path) -> None:
    """A ledger that already holds the study's whole ε refuses the round; the exit code says refusal."""
    study = small_study(
        training={"rounds": 2, "local_steps": 2, "local_epochs": 0, "optimizer": "sgd", "learning_rate": 0.1},
        privacy={"mode": "local", "epsilon": 4.0, "delta": 1e-2, "sample_rate": 0.5, "crops_per_patient": 2},
    )
    simulate(study, sites, tmp_path / "out", workers=1)
    from fedneuro.server.store import RunStore

    store = RunStore.load(tmp_path / "out")
    last = store.rounds()[0]
    store.save_round(last, {"model": store.groups(2)["model"]})  # a coordinator that went back to round 0
    store._execute(__import__("sqlalchemy").text("UPDATE run SET status = 'running', final = NULL"))
    store.close()
    with pytest.raises(FedNeuroError, match="budget") as caught:
        Simulation(study=study, sites=sites, out=tmp_path / "out", workers=1).run(resume=True)
    assert caught.value.exit_code == 3


@pytest.mark.parametrize(
    "fault", ["mask-shape", "image-nan", "image-4d", "mask-empty", "image-missing", "image-corrupt"]
)
def test_bad_scan_is_named_with_its_remedy(tmp_path: Path, sites: Path, fault: str) -> None:
    FAULTS[fault](sites / "south")
    with pytest.raises(FedNeuroError, match=r"south.*sub-P001") as caught:
        simulate(small_study(), sites, tmp_path / "out", workers=1)
    assert caught.value.exit_code == 2


def test_no_patients(tmp_path: Path, sites: Path) -> None:
    (sites / "empty").mkdir()
    (sites / "empty/dataset_description.json").write_text('{"Name": "empty", "BIDSVersion": "1.10.0"}')
    with pytest.raises(FedNeuroError, match="empty") as caught:
        simulate(small_study(), sites, tmp_path / "out", workers=1)
    assert caught.value.exit_code == 2


def test_one_data_set_is_not_a_folder_of_sites(tmp_path: Path, sites: Path) -> None:
    with pytest.raises(DataError, match="fedneuro-sim split"):
        simulate(small_study(), sites / "north", tmp_path / "out")


def command(study: Study, sites: Path, out: Path, *more: str) -> list[str]:
    path = sites.parent / f"{out.name}.toml"
    path.write_text(describe(study))
    program = Path(sys.executable).with_name("fedneuro-sim")
    return [str(program), "run", str(path), "--sites", str(sites), "--out", str(out), *more]


def wait_for_round(out: Path, number: int, process: "subprocess.Popen[str]") -> None:
    """Until round ``number`` has begun."""
    from fedneuro.server.store import RunStore

    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        if (out / "state/run.db").is_file():
            try:
                if any(e.kind == "round-started" and e.round >= number for _, e in RunStore.load(out).events()):
                    return
            except FedNeuroError:
                pass  # the database is being made
        time.sleep(0.02)
    raise AssertionError(
        f"round {number} did not begin: {process.communicate() if process.poll() is not None else 'timeout'}"
    )


INTERRUPTED = {"rounds": 4, "local_epochs": 4, "batch_size": 1}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The model that nobody interrupted."""
    base = tmp_path_factory.mktemp("undisturbed")
    return simulate(small_study(training=INTERRUPTED), write_sites(base / "sites"), base / "whole", workers=1)[1]


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_interrupted_run_leaves_no_process_and_resumes_to_the_same_bits(
    tmp_path: Path, sites: Path, how: signal.Signals, undisturbed: dict[str, bytes]
) -> None:
    study, out = small_study(training=INTERRUPTED), tmp_path / "cut"
    process = subprocess.Popen(
        command(study, sites, out, "--workers", "2"), stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    wait_for_round(out, 2, process)
    children = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, how)
    _, errors = process.communicate(timeout=60)
    if how != signal.SIGKILL:
        assert process.returncode == 130
        assert errors.count("error:") == 1 and "--resume" in errors and "Traceback" not in errors
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not [p for p in alive if p.status() != psutil.STATUS_ZOMBIE]
    if how == signal.SIGINT:
        with pytest.raises(FedNeuroError, match="add --resume"):
            Simulation(study=study, sites=sites, out=out).run()
        subprocess.run(command(study, sites, out, "--resume", "--workers", "1"), check=True, capture_output=True)
    else:
        Simulation(study=study, sites=sites, out=out, workers=1).run(resume=True)
    assert model_bytes(out) == undisturbed


def test_worker_that_dies_is_a_lost_site_and_the_run_resumes(tmp_path: Path, sites: Path) -> None:
    study = small_study(
        training={"rounds": 3, "local_epochs": 12, "batch_size": 1},
        evaluation={"heldout": ["west"], "every": 0, "bootstrap": 100},
    )
    simulate(study, sites, tmp_path / "whole", workers=1)
    out = tmp_path / "cut"
    process = subprocess.Popen(command(study, sites, out, "--workers", "2"), stderr=subprocess.PIPE, text=True)
    wait_for_round(out, 2, process)
    forked = [p for p in psutil.Process(process.pid).children(recursive=True) if not p.children()]
    for child in sorted(forked, key=lambda p: p.create_time())[-2:]:
        child.kill()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 4 and "lost" in errors and "Traceback" not in errors, errors
    Simulation(study=study, sites=sites, out=out, workers=2).run(resume=True)
    assert model_bytes(out) == model_bytes(tmp_path / "whole")


def test_full_disk(tmp_path: Path, sites: Path) -> None:
    """A tmpfs of 300 kB fills up; the message names the folder, and with room the run goes on."""
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(small)], capture_output=True)
    if mounted.returncode:
        pytest.skip("only root may mount a small file system")
    study = small_study(model={"channels": [8, 16]}, training={"rounds": 8, "local_epochs": 1, "batch_size": 2})
    try:
        out = small / "out"
        full = subprocess.run(
            command(study, sites, out, "--workers", "1", "--cache", str(tmp_path / "cache")),
            capture_output=True,
            text=True,
        )
        assert full.returncode == 5, full.stderr
        assert "free" in full.stderr and "Traceback" not in full.stderr
        subprocess.run(["mount", "-o", "remount,size=50M", str(small)], check=True)
        results = Simulation(study=study, sites=sites, out=out, workers=1, cache=tmp_path / "cache").run(resume=True)
        assert results["status"] == "complete" and math.isfinite(results["seconds"])
    finally:
        subprocess.run(["umount", str(small)], check=True)

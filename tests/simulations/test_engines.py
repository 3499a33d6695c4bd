# SPDX-License-Identifier: Apache-2.0
"""The demonstration's study without privacy, on phantoms, after pre-training: every engine gives the same bits."""

from pathlib import Path
from typing import Any

import pytest

from fedneuro.models.state import digest, load_saved
from fedneuro.privacy.study import Study
from fedneuro.privacy.study_file import load_study
from fedneuro.simulations.demo import STUDIES
from fedneuro.simulations.phantoms import write_federation
from fedneuro.simulations.run import Simulation

pytestmark = pytest.mark.deployment


@pytest.fixture(scope="module")
def hospitals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("phantoms")
    write_federation(folder, sites={"east": 6, "west": 5, "lake": 2}, seed=3, modalities=("FLAIR",))
    return folder


@pytest.fixture(scope="module")
def study() -> Study:
    changes = ["privacy.mode=none", 'evaluation.heldout=["lake"]', "training.rounds=2", "training.local_steps=3"]
    changes += ["evaluation.bootstrap=100", "training.learning_rate=0.1", "training.batch_size=4"]
    changes += ["training.init.from=phantoms", "training.init.steps=2", "training.init.patients=1"]
    return load_study(STUDIES / "demo.toml", changes)


@pytest.fixture(scope="module")
def reference(study: Study, hospitals: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    return simulate(study, hospitals, tmp_path_factory.mktemp("reference") / "out", "inprocess", 1)


def simulate(study: Study, hospitals: Path, out: Path, engine: Any, workers: int) -> tuple[dict[str, Any], str]:
    results = Simulation(study=study, sites=hospitals, out=out, engine=engine, workers=workers).run()
    return results, digest(load_saved(out / "model.safetensors")[0])


@pytest.mark.parametrize(("engine", "workers"), [("inprocess", 2), ("ray", 2), ("deployment", 0)])
def test_same_bits(
    study: Study,
    hospitals: Path,
    reference: tuple[dict[str, Any], str],
    tmp_path: Path,
    engine: str,
    workers: int,
    request: pytest.FixtureRequest,
) -> None:
    if engine == "ray":
        request.getfixturevalue("alone_with_ray")
    results, model = simulate(study, hospitals, tmp_path / "out", engine, workers)
    expected, expected_model = reference
    assert model == expected_model
    assert results["study_hash"] == expected["study_hash"]
    assert results["sites"] == expected["sites"]
    assert results["start"] == expected["start"]
    assert results["start"]["digest"]
    assert [r["metrics"] for r in results["rounds"]] == [r["metrics"] for r in expected["rounds"]]
    assert (tmp_path / "out/report.html").is_file()

# SPDX-License-Identifier: Apache-2.0
"""Arrays that stay in their file: the same bits, a run that does not notice, and memory that comes back."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fedneuro.models.state import digest, save_arrays
from fedneuro.server import paged
from fedneuro.server.paged import page
from tests.server.test_rounds import Sites, run, study_of


def test_the_same_bits_in_the_same_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paged, "LARGE", 0)
    rng = np.random.default_rng(1)
    model: dict[str, NDArray[Any]] = {
        "z": rng.normal(size=(3, 5)).astype(np.float32), "flag": np.array([True, False, True]), "a": np.arange(4),
        "scalar": np.full((), 2.5, np.float32), "none": np.zeros((0, 3), np.float32), "half": np.ones(3, np.float16),
    }  # fmt: skip
    groups: dict[str, dict[str, NDArray[Any]]] = {"model": model, "strategy.momentum": {"z": model["z"] * 2}}
    save_arrays(
        tmp_path / "r", {f"{g}/{n}": array for g, members in groups.items() for n, array in members.items()}, {}
    )
    found = page(tmp_path / "r", groups)
    assert found is not None and list(found.groups) == list(groups)
    for group, members in groups.items():
        assert list(found.groups[group]) == list(members) and digest(found.groups[group]) == digest(members)
    found.let_go()
    assert digest(found.groups["model"]) == digest(model), "what was let go is read again"
    (tmp_path / "r").unlink()  # as old rounds are
    assert digest(found.groups["model"]) == digest(model)
    with pytest.raises(ValueError, match="read-only"):
        found.groups["model"]["z"][0] = 1


@pytest.mark.parametrize("name", ["fedavg", "fedadam", "median"])
def test_a_run_does_not_notice(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    study = study_of(strategy={"name": name}, training={"ema": 0.5})
    with monkeypatch.context() as patch:
        plain, _ = run(tmp_path / "plain", study, Sites())
        patch.setattr(paged, "LARGE", 0)
        mapped, _ = run(tmp_path / "mapped", study, Sites())
    assert plain._paged is None and mapped._paged is not None
    for number in (2, 3):
        before, after = plain.groups(number), mapped.groups(number)
        assert {group: digest(arrays) for group, arrays in before.items()} == {
            group: digest(arrays) for group, arrays in after.items()
        }


def test_memory_comes_back(tmp_path: Path) -> None:
    def resident() -> float:
        found = re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())
        assert found is not None
        return int(found[1]) / 1024

    model = {"w": np.ones(8_000_000, np.float32)}  # 32 MB
    save_arrays(tmp_path / "r", {f"model/{name}": array for name, array in model.items()}, {})
    found = page(tmp_path / "r", {"model": model})
    assert found is not None
    total, touched = float(found.groups["model"]["w"].sum()), resident()
    found.let_go()
    assert total == 8_000_000 and touched - resident() > 25

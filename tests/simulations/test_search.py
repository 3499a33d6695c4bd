# SPDX-License-Identifier: Apache-2.0
"""A search that Optuna leads: it learns from what was tried, and one that goes on repeats nothing."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from fedneuro.simulations.designs.execute import Failure
from fedneuro.simulations.designs.space import Space
from fedneuro.simulations.designs.sweep import _by_optuna
from tests.bids import make_study

pytest.importorskip("optuna", reason="Optuna is not installed; pip install 'fedneuro[search]'")
Batch = Sequence[tuple[int, dict[str, Any]]]
KEY = "training.ema"


class Search:
    """Runs that need no training: what a setting is worth is known. One setting in seven fails."""

    def __init__(self, out: Path) -> None:
        self.out, self.values, self.performed = out, {"trials": dict[str, Any]()}, list[int]()

    def run(self, trials: int, workers: int = 2) -> None:
        space = Space.parse([], [f"{KEY}=uniform(0, 0.9)"], trials=trials, search="optuna", seeds=1)
        failures = _by_optuna(space, make_study(), self.out, self.values, workers, self._perform)
        assert all(failure.exit_code == 5 for failure in failures.values())

    def _perform(self, batch: Batch) -> dict[str, Failure]:
        failures = {}
        for number, setting in batch:
            name = f"trial-{number + 1:03d}"
            self.performed.append(number)
            self.values["trials"][name] = {"number": number, "setting": setting, "study": name}
            if number % 7 == 3:
                failures[name] = Failure(text="its process ended", exit_code=5)
                continue
            worth = {"schema_version": 1, "study_hash": name, "status": "complete"}
            worth |= {"select": {"value": 1.0 - (setting[KEY] - 0.3) ** 2}}
            (self.out / "runs" / name).mkdir(parents=True, exist_ok=True)
            (self.out / "runs" / name / "results.json").write_text(json.dumps(worth))
        return failures

    @property
    def tried(self) -> list[float]:
        return [trial["setting"][KEY] for trial in self.values["trials"].values()]


def test_it_comes_near_the_best_and_repeats_nothing_when_it_goes_on(tmp_path: Path) -> None:
    search = Search(tmp_path)
    search.run(12)
    assert len(set(search.tried)) == 12 and search.performed == list(range(12))
    first = list(search.tried)
    search.performed.clear()
    search.run(40)
    assert search.tried[:12] == first and len(set(search.tried)) == 40
    assert search.performed == list(range(40))  # the first twelve only to look whether they are whole
    late = search.tried[25:]
    assert sum(abs(value - 0.3) < 0.15 for value in late) > len(late) / 2  # a third, were they drawn evenly
    assert min(abs(value - 0.3) for value in search.tried) < 0.03


def test_the_same_search_draws_the_same_settings(tmp_path: Path) -> None:
    one, other = Search(tmp_path / "one"), Search(tmp_path / "other")
    one.run(8)
    other.run(8)
    assert one.tried == other.tried

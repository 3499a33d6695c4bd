# SPDX-License-Identifier: Apache-2.0
"""A whole study in mode ``distributed`` on simulated hospitals, a lost one among them, and what its report says."""

import json
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path

import jsonschema
import pytest
from flwr.clientapp import ClientApp

from fedneuro.client.app import serve
from fedneuro.privacy.contract import Refusal, Reply, Request
from fedneuro.privacy.errors import Reason
from fedneuro.privacy.study import Study
from fedneuro.privacy.wire import MESSAGE_TYPES
from fedneuro.server.events import ignore
from fedneuro.server.rounds import run_study
from fedneuro.server.store import RunStore
from fedneuro.simulations.benchmarks.rounds import write_tiny_site
from fedneuro.simulations.benchmarks.secagg import bench_secagg
from fedneuro.simulations.engines.inprocess import InProcessTransport
from fedneuro.simulations.run import Simulation, finish
from fedneuro.simulations.sites import find_sites, site_settings
from tests.bids import make_study

ROOT = Path(__file__).parents[2]


def study_of(tolerate: int = 1, rounds: int = 3) -> Study:
    return make_study(
        training={
            "rounds": rounds,
            "local_steps": 1,
            "local_epochs": 0,
            "optimizer": "adam",
            "device": "cpu",
            "ema": 0.5,
        },
        privacy={
            "mode": "distributed",
            "delta": 1e-2,
            "sample_rate": 1.0,
            "crops_per_patient": 2,
            "tolerate": tolerate,
        },
        evaluation={"every": 0, "bootstrap": 100, "previews": 0, "heldout": ["lake"]},
    )


class Losing(InProcessTransport):
    """West cannot be reached after it sent its keys in round 2."""

    def exchange(self, requests: Mapping[str, Request], timeout: float) -> Iterator[Reply]:
        west = requests.get("west")
        if west is not None and west.round == 2 and west.kind == "masked":
            yield Refusal(site="west", kind=west.kind, round=2, reason=Reason.LOST)
            requests = {name: request for name, request in requests.items() if name != "west"}
        yield from super().exchange(requests, timeout)


def test_a_study_with_a_lost_hospital_ends_and_its_report_says_what_was_promised(tmp_path: Path) -> None:
    for seed, name in enumerate(("east", "lake", "north", "south", "west")):
        write_tiny_site(tmp_path / "sites" / name, seed=seed, patients=5)
    study, out = study_of(), tmp_path / "out"
    settings = site_settings(study, find_sites(tmp_path / "sites"), out)
    with Losing(settings) as transport, closing(RunStore.create(out, study, engine="inprocess")) as store:
        run_study(study, transport, store, ignore)
        second = store.rounds()[2]
    results = finish(out)
    jsonschema.validate(results, json.loads((ROOT / "docs" / "results.schema.json").read_text(encoding="utf-8")))
    assert second.refusals == {"west": "lost"}
    assert sorted(second.train) == ["east", "north", "south"]
    epsilon = results["privacy"]["epsilon"]
    assert sorted(epsilon) == ["east", "north", "south", "west"]  # of the held-out lake nothing is spent
    assert 0 < epsilon["west"] < epsilon["east"] <= study.privacy.epsilon  # two rounds and three
    report = (out / "report.html").read_text(encoding="utf-8")
    assert "only the sum over the hospitals" in report
    assert "hospitals that may drop out or collude" in report


@pytest.mark.deployment
def test_the_three_exchanges_of_a_round_travel_as_real_messages(tmp_path: Path) -> None:
    for seed, name in enumerate(("east", "lake", "north", "west")):
        write_tiny_site(tmp_path / "sites" / name, seed=seed, patients=5)
    study = study_of(tolerate=0, rounds=2)
    results = Simulation(study=study, sites=tmp_path / "sites", out=tmp_path / "out", engine="deployment").run()
    assert results["status"] == "complete"
    assert [record["refusals"] for record in results["rounds"]] == [{}] * len(results["rounds"])
    epsilon = results["privacy"]["epsilon"]
    assert sorted(epsilon) == ["east", "north", "west"] and len(set(epsilon.values())) == 1


def test_every_kind_of_message_is_served() -> None:
    app = ClientApp()
    served: list[str] = []

    class Recorder:
        def __getattr__(self, category: str) -> object:
            def register(action: str = "default") -> object:
                served.append(category if action == "default" else f"{category}.{action}")
                return getattr(app, category)(action)

            return register

    serve(Recorder(), lambda _: pytest.fail("no message was sent"))  # type: ignore[arg-type]
    assert sorted(served) == sorted(MESSAGE_TYPES.values())


def test_the_benchmark_compares_sums_that_are_equal() -> None:
    found = bench_secagg(sites=4, parameters=20_000, repeats=1)
    assert found["largest_error_in_grid_steps"] == 0
    assert found["masked_over_unmasked"] > 1

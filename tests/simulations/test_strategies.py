# SPDX-License-Identifier: Apache-2.0
"""Small federations of real sites under the strategies that keep something at the site: killed, resumed, judged."""

from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from fedneuro.models.state import digest, load_saved
from fedneuro.privacy.contract import Reply, Request, TrainReply
from fedneuro.privacy.study import Study
from fedneuro.privacy.wire_layout import stays
from fedneuro.server.events import ignore
from fedneuro.server.rounds import initial_arrays, run_study
from fedneuro.server.store import RunStore
from fedneuro.simulations.benchmarks.rounds import write_tiny_site
from fedneuro.simulations.engines.inprocess import InProcessTransport
from fedneuro.simulations.sites import find_sites, site_settings
from tests.bids import make_study

SECTIONS: dict[str, dict[str, Any]] = {
    "fedbn-float16": {"strategy": {"name": "fedbn"}, "wire": {"up": "float16"}},
    "scaffold-int8": {"strategy": {"name": "scaffold"}, "wire": {"up": "int8"}},
    "ditto": {"strategy": {"name": "ditto"}, "evaluation": {"select": "last"}},
    "fedyogi-bfloat16": {"strategy": {"name": "fedyogi"}, "wire": {"up": "bfloat16"}},
}
KEPT = {
    "fedbn-float16": ("norms", "residual"), "scaffold-int8": ("variate", "residual"),
    "ditto": ("personal",), "fedyogi-bfloat16": ("residual",),
}  # fmt: skip
SITES = ("east", "lake", "west")


@pytest.fixture(scope="module")
def hospitals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hospitals")
    for seed, name in enumerate(SITES):
        write_tiny_site(folder / name, seed=seed, patients=4)
    return folder


def study_of(sections: dict[str, Any]) -> Study:
    evaluation = {"heldout": ["lake"], "bootstrap": 100, "previews": 0, "metrics": ["dice"], "every": 0}
    return make_study(
        **sections
        | {
            "model": {"channels": [4, 8], "residual_units": 1},
            "training": {
                "rounds": 3, "local_steps": 3, "local_epochs": 0, "optimizer": "sgd", "learning_rate": 0.2,
                "device": "cpu",
            },
            "evaluation": evaluation | sections.get("evaluation", {}),
        }
    )  # fmt: skip


class Killed(BaseException):
    """The power goes."""


class Watched(InProcessTransport):
    """Remembers what came up, and dies when the second site of a round is asked to train, if told to."""

    fatal_round = 0

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.names: set[str] = set()

    def exchange(self, requests: Mapping[str, Request], timeout: float) -> Iterator[Reply]:
        for count, reply in enumerate(super().exchange(requests, timeout)):
            if isinstance(reply, TrainReply):
                self.names |= set(reply.arrays)
                if reply.round == self.fatal_round and count:
                    raise Killed
            yield reply


def run(study: Study, hospitals: Path, out: Path, fatal_round: int = 0) -> set[str]:
    """Begin a run or go on with it, with sites in new processes, as it were; the names of arrays that came up."""
    begun = (out / "state" / "run.db").exists()
    opened = RunStore.resume(out, study, engine="test") if begun else RunStore.create(out, study, engine="test")
    transport = Watched(site_settings(study, find_sites(hospitals), out))
    transport.fatal_round = fatal_round
    with closing(opened) as store, transport:
        run_study(study, transport, store, ignore)
        return transport.names


def result(study: Study, out: Path) -> tuple[str, Any]:
    with closing(RunStore.load(out)) as store:
        groups = store.groups(study.training.rounds)
        return digest({f"{g}/{n}": a for g, arrays in groups.items() for n, a in arrays.items()}), store.final()


@pytest.mark.parametrize("name", SECTIONS)
def test_killed_in_the_middle_of_a_round_and_resumed_with_restarted_sites(
    hospitals: Path, tmp_path: Path, name: str
) -> None:
    """East has trained in round 2 and West's reply is lost with the coordinator; East trains that round again."""
    study = study_of(SECTIONS[name])
    names = run(study, hospitals, tmp_path / "whole")
    with pytest.raises(Killed):
        run(study, hospitals, tmp_path / "cut", fatal_round=2)
    run(study, hospitals, tmp_path / "cut")
    assert result(study, tmp_path / "whole") == result(study, tmp_path / "cut")
    model = initial_arrays(study)["model"]
    assert {n.removeprefix("scale/") for n in names} == set(model) - stays(study)
    for kind in KEPT[name]:
        files = [
            tmp_path / run_name / "sites" / site / study.hash[:16] / f"{kind}-00003.safetensors"
            for run_name in ("whole", "cut")
            for site in ("east", "west")
        ]
        east, west, east_again, west_again = (digest(load_saved(path)[0]) for path in files)
        assert (east, west) == (east_again, west_again) and east != west
    with closing(RunStore.load(tmp_path / "whole")) as store:
        last = store.groups(3)["model"]
    assert all(last[array].tobytes() == model[array].tobytes() for array in stays(study))
    assert not list((tmp_path / "whole" / "sites" / "lake").rglob("*-0000*")), "a held-out site keeps nothing"

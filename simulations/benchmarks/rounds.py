# SPDX-License-Identifier: Apache-2.0
"""Seconds per round of a deployment without work, and of stock Flower beside it, measured in one run.

Both arms: one SuperLink with TLS, node authentication and SQLite on this machine, as many hospitals, a model of the
same number of parameters, FedAvg, no evaluation between rounds. FedNeuro's arm is a rehearsal of a study whose
sites take one optimiser step on four tiny images; the larger model has its weights where the images are smallest, so
that this step is short, too. Stock Flower's arm is Flower's own FedAvg over its
default isolation, with a ClientApp that adds one to each weight; its model is one array, which suits it.

The figure is the median over all rounds but the first, in which a node loads its data. Seconds depend on
the machine and its load; the ratio is the result.
"""

import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import nibabel
import numpy as np

from ...models.networks import build_network
from ...models.state import to_arrays
from ...privacy.errors import EnvironmentProblem
from ...privacy.study import Study
from ...server.store import RunStore
from ..certificates import make_certificates, make_node_key
from ..control import Control
from ..processes import Processes, claim_port
from ..rehearsal import rehearse
from ..sites import find_sites, site_settings

__all__ = ["bench_rounds", "write_tiny_site"]

_NIB: Any = nibabel  # it carries no type information

HOSPITALS = 2
NETWORKS = {0: ((4, 8), 0), 5: ((8, 16, 32, 344), 2)}
"""Channels and residual units of a network of so many megabytes; 0: of 2 kB."""
STOCK_SUPERLINK = "flwr.superlink.cli.flower_superlink:flower_superlink"
STOCK_SECONDS = 600.0
"""Patience with the stock arm."""


def bench_rounds(
    json_path: Path | None = None, rounds: int = 5, *, hospitals: int = HOSPITALS, megabytes: int = 0
) -> dict[str, Any]:
    """Measure both arms and return (and save) the figures.

    Args:
        json_path: where to save.
        rounds: per arm, at least 2.
        hospitals: how many, at least 1.
        megabytes: of the model, a key of :data:`NETWORKS`.
    """
    study, names = _study(rounds, megabytes), [f"hospital-{number}" for number in range(1, hospitals + 1)]
    found: dict[str, Any] = {"hospitals": hospitals, "rounds": rounds, "parameters": _parameters(study)}
    with tempfile.TemporaryDirectory(prefix="fn-rounds-") as folder:
        found["fedneuro"] = _figures(_fedneuro_arm(study, names, Path(folder)))
        found["stock_flower"] = _figures(_stock_arm(rounds, found["parameters"], names, Path(folder) / "stock"))
    found["ratio"] = found["stock_flower"]["seconds_per_round"] / found["fedneuro"]["seconds_per_round"]
    if json_path:
        json_path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return found


def write_tiny_site(
    folder: Path, *, patients: int = 8, seed: int = 0, shape: tuple[int, int, int] = (16, 16, 4)
) -> None:
    """Write a BIDS data set of noise with a bright block as the lesion.

    Args:
        folder: the data set.
        patients: how many.
        seed: another seed, other noise.
        shape: voxels of 1 mm; at least (10, 10, 3).
    """
    rng = np.random.default_rng(seed)
    for number in range(1, patients + 1):
        name = f"sub-{number:02d}"
        mask = np.zeros(shape, np.uint8)
        mask[4:10, 4:10, 1:3] = 1
        image = rng.normal(100.0, 10.0, shape).astype(np.float32) + np.float32(60) * mask
        for path, array in (
            (folder / name / "anat" / f"{name}_FLAIR.nii.gz", image),
            (folder / "derivatives" / "manual" / name / "anat" / f"{name}_label-lesion_mask.nii.gz", mask),
        ):
            path.parent.mkdir(parents=True, exist_ok=True)
            scan = _NIB.Nifti1Image(array, np.eye(4))
            scan.header.set_xyzt_units("mm")
            _NIB.save(scan, path)
    description = '{"Name": "tiny", "BIDSVersion": "1.10.0"}\n'
    (folder / "dataset_description.json").write_text(description, encoding="utf-8")


def _figures(seconds: list[float]) -> dict[str, Any]:
    return {"seconds_per_round": median(seconds[1:]), "all_rounds": [round(value, 3) for value in seconds]}


def _study(rounds: int, megabytes: int) -> Study:
    channels, units = NETWORKS[megabytes]
    return Study.parse(
        {
            "study": {"name": "no-work"},
            "data": {"patch": [16, 16], "augment": "none"},
            "model": {"channels": list(channels), "residual_units": units},
            "training": {"rounds": rounds, "local_steps": 1, "batch_size": 4, "device": "cpu"},
            "privacy": {"mode": "none"},
            "evaluation": {"every": 0, "previews": 0},
        }
    )


def _parameters(study: Study) -> int:
    network = build_network(study.model, in_channels=1, out_channels=study.task.channels, seed=0)
    return sum(int(array.size) for array in to_arrays(network).values())


def _fedneuro_arm(study: Study, names: list[str], folder: Path) -> list[float]:
    for seed, name in enumerate(names):
        write_tiny_site(folder / "sites" / name, seed=seed)
    out = folder / "fedneuro"
    with closing(RunStore.create(out, study, engine="deployment")) as store:
        rehearse(study, site_settings(study, find_sites(folder / "sites"), out), store)
        return [record.seconds for record in store.rounds() if record.round]


# -- stock Flower --------------------------------------------------------------------------------------------

_PROJECT = """\
[project]
name = "stock"
version = "1.0.0"
[tool.flwr.app]
publisher = "bench"
[tool.flwr.app.components]
serverapp = "stock.server_app:app"
clientapp = "stock.client_app:app"
[tool.flwr.app.config]
rounds = 5
size = 1000
nodes = 2
out = ""
"""
_SERVER = """\
import json, os, time
import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

app = ServerApp()

@app.main()
def main(grid: Grid, context: Context) -> None:
    config, stamps = context.run_config, []
    arrays = ArrayRecord({"w": Array(np.zeros(int(config["size"]), np.float32))})

    def stamp(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        stamps.append(time.monotonic())
        return MetricRecord({"round": server_round})

    nodes = int(config["nodes"])
    FedAvg(fraction_evaluate=0.0, min_train_nodes=nodes, min_available_nodes=nodes).start(
        grid=grid, initial_arrays=arrays, num_rounds=int(config["rounds"]), evaluate_fn=stamp
    )
    part = config["out"] + ".part"
    with open(part, "w") as file:
        json.dump([float(x) for x in np.diff(stamps)], file)
    os.replace(part, config["out"])
"""
_CLIENT = """\
import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()

@app.train()
def train(message: Message, context: Context) -> Message:
    arrays = message.content["arrays"]
    new = ArrayRecord({name: Array(array.numpy() + np.float32(1)) for name, array in arrays.items()})
    content = RecordDict({"arrays": new, "metrics": MetricRecord({"num-examples": 10})})
    return Message(content, reply_to=message)
"""


def _stock_arm(rounds: int, size: int, names: list[str], folder: Path) -> list[float]:
    """Seconds of each round of Flower's own FedAvg, every process as its command line starts it."""
    from flwr.cli.build import build_fab_from_files

    folder.mkdir()
    files = {"pyproject.toml": _PROJECT, "stock/__init__.py": "", "stock/server_app.py": _SERVER}
    files |= {"stock/client_app.py": _CLIENT}
    content = build_fab_from_files({name: text.encode() for name, text in files.items()})[0]
    address = f"127.0.0.1:{claim_port()}"
    certificates = make_certificates(folder)
    env = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    result = folder / "seconds.json"
    with (
        _swept(folder),
        Processes(folder / "logs", env) as processes,
        closing(Control(address, certificates.authority)) as control,
    ):
        host, port = address.split(":")
        superlink = ["--host", host, "--port", port, "--database", str(folder / "superlink.db")]
        superlink += ["--ssl-ca-certfile", str(certificates.authority), "--ssl-certfile", str(certificates.server)]
        superlink += ["--ssl-keyfile", str(certificates.server_key), "--enable-supernode-auth"]
        superlink += ["--disable-runtime-dependency-installation"]
        processes.start("superlink", STOCK_SUPERLINK, superlink, {"FLWR_HOME": str(folder / "home")})
        _until(control.is_healthy, processes, "superlink")
        for name in names:
            control.register(make_node_key(folder / f"{name}.key"), name)
            node = ["--superlink", address, "--root-certificates", str(certificates.authority)]
            node += ["--auth-supernode-private-key", str(folder / f"{name}.key")]
            node += ["--host", "127.0.0.1", "--port", str(claim_port())]
            entry = "flwr.supernode.cli.flower_supernode:flower_supernode"
            processes.start(name, entry, node, {"FLWR_HOME": str(folder / f"home-{name}")})
        _until(lambda: control.online() >= set(names), processes, *names)
        control.start_run(content, {"rounds": rounds, "size": size, "nodes": len(names), "out": str(result)})
        _until(result.is_file, processes, "superlink", *names)
        seconds: list[float] = json.loads(result.read_text(encoding="utf-8"))
        return seconds


def _until(done: Any, processes: Processes, *names: str) -> None:
    deadline = time.monotonic() + STOCK_SECONDS
    while not done():
        ended = [name for name in names if processes.code(name) is not None]
        if ended or time.monotonic() > deadline:
            why = f"{ended[0]} ended: {processes.last_line(ended[0])}" if ended else f"after {STOCK_SECONDS:.0f} s"
            raise EnvironmentProblem(f"stock Flower did not finish: {why}")
        time.sleep(0.2)


@contextmanager
def _swept(folder: Path) -> Iterator[None]:
    """Afterwards end, one by one, what stock Flower's processes started in sessions of their own."""
    import psutil

    try:
        yield
    finally:
        for process in psutil.process_iter():
            try:
                if process.environ().get("FLWR_HOME", "").startswith(str(folder)):
                    process.kill()
            except psutil.Error:
                continue

# SPDX-License-Identifier: Apache-2.0
"""What FedNeuro costs beside a plain PyTorch loop that does the same job, measured in one run.

Job: four clients, three rounds, one local epoch, MONAI UNet 3D 16-32-64-128 (strides 2, two residual units),
volumes of 48³, eight per client, batch 2, Adam, Dice + cross entropy, FedAvg. The two arms run in turn, each
in a process of its own with one thread, several times; wall time and the peak resident memory of the whole
process tree are medians. A second part measures a round without computation: a model of 50 MB, four sites.

Ratios are the result; seconds depend on the machine.
"""

import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["bench_overhead", "peak_memory"]

CLIENTS, VOLUMES, SIDE, ROUNDS = 4, 8, 48, 3
REPEATS = 3


def bench_overhead(json_path: Path | None = None, *, repeats: int = REPEATS) -> dict[str, Any]:
    """Run both parts and return (and save) the figures."""
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "sites"
        write_job(data)
        runs: dict[str, list[dict[str, float]]] = {"plain": [], "fedneuro": []}
        for index in range(repeats):
            for arm in runs:
                runs[arm].append(_run_arm(arm, data, Path(folder) / f"{arm}-{index}"))
        idle = _run_arm("idle", data, Path(folder) / "idle")
    found: dict[str, Any] = {
        arm: {key: median(run[key] for run in arm_runs) for key in ("seconds", "peak_mb")}
        for arm, arm_runs in runs.items()
    }
    found["wall_ratio"] = found["fedneuro"]["seconds"] / found["plain"]["seconds"]
    found["memory_ratio"] = found["fedneuro"]["peak_mb"] / found["plain"]["peak_mb"]
    found["idle_50mb"] = idle
    found["runs"] = runs
    if json_path:
        json_path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return found


def write_job(folder: Path) -> None:
    """Four BIDS sites of eight random 48³ volumes with a bright cube as the lesion."""
    nibabel: Any = importlib.import_module("nibabel")  # it has no types
    for client in range(CLIENTS):
        rng = np.random.default_rng(client)
        for index in range(VOLUMES):
            image = rng.normal(100, 20, (SIDE,) * 3).astype(np.float32)
            mask = np.zeros((SIDE,) * 3, np.uint8)
            corner = rng.integers(4, SIDE - 16, 3)
            box = tuple(slice(c, c + 12) for c in corner)
            mask[box], image[box] = 1, image[box] + 60
            name = f"sub-{index + 1:02d}"
            for values, path in (
                (image, f"site-{client + 1}/{name}/anat/{name}_FLAIR.nii.gz"),
                (mask, f"site-{client + 1}/derivatives/manual/{name}/anat/{name}_label-lesion_mask.nii.gz"),
            ):
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                scan = nibabel.Nifti1Image(values, np.eye(4))
                scan.header.set_xyzt_units("mm")
                nibabel.save(scan, folder / path)
        (folder / f"site-{client + 1}" / "dataset_description.json").write_text(
            '{"Name": "job", "BIDSVersion": "1.10.0"}'
        )


def _run_arm(arm: str, data: Path, out: Path) -> dict[str, float]:
    code = f"from {__name__} import ARMS; import sys; ARMS[sys.argv[1]](*sys.argv[2:])"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    started = time.monotonic()
    process = subprocess.Popen(  # noqa: S603 - our own interpreter and code
        [sys.executable, "-c", code, arm, str(data), str(out)], env=environment, stdout=subprocess.PIPE, text=True
    )
    peak = peak_memory(process)
    text = process.communicate()[0]
    if process.returncode:
        raise RuntimeError(f"the {arm} arm ended with code {process.returncode}")
    figures = {"seconds": time.monotonic() - started, "peak_mb": peak}
    return figures | (json.loads(text) if text.strip() else {})


def peak_memory(process: "subprocess.Popen[str]", interval: float = 0.05) -> float:
    """Peak of the summed resident memory of ``process`` and its descendants in MB, until it ends."""
    import psutil

    peak, root = 0, psutil.Process(process.pid)
    while process.poll() is None:
        total = 0
        try:
            for member in [root, *root.children(recursive=True)]:
                total += member.memory_info().rss
        except psutil.NoSuchProcess:
            continue
        peak = max(peak, total)
        time.sleep(interval)
    return peak / 1e6


def plain_arm(data: str, out: str) -> None:
    """The job as one would write it by hand."""
    import torch
    from monai.losses.dice import DiceCELoss
    from monai.networks.nets.unet import UNet
    from safetensors.torch import save_file

    torch.set_num_threads(1)
    torch.manual_seed(0)

    def build() -> torch.nn.Module:
        return UNet(3, 1, 2, channels=(16, 32, 64, 128), strides=(2, 2, 2), num_res_units=2)

    def load(site: Path, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        image = _voxels(site / name / "anat" / f"{name}_FLAIR.nii.gz").astype(np.float32)
        mask = _voxels(site / "derivatives/manual" / name / "anat" / f"{name}_label-lesion_mask.nii.gz")
        image = (image - image.mean()) / image.std()
        return torch.from_numpy(image)[None], torch.from_numpy(mask.astype(np.int64))[None]

    clients = []
    for site in sorted(Path(data).iterdir()):
        scans = [load(site, p.name) for p in sorted(site.glob("sub-*"))]
        network = build()
        clients.append((scans, network, torch.optim.Adam(network.parameters(), 1e-3)))
    loss_of = DiceCELoss(include_background=False, to_onehot_y=True, softmax=True)
    state = build().state_dict()
    for _ in range(ROUNDS):
        states = []
        for scans, network, optimizer in clients:
            network.load_state_dict(state)
            order = torch.randperm(len(scans))
            for start in range(0, len(scans), 2):
                rows = order[start : start + 2].tolist()
                images = torch.stack([scans[i][0] for i in rows])
                labels = torch.stack([scans[i][1] for i in rows])
                optimizer.zero_grad()
                loss_of(network(images), labels).backward()
                optimizer.step()
            states.append({k: v.clone() for k, v in network.state_dict().items()})
        state = {k: torch.stack([s[k] for s in states]).mean(0) for k in state}
    Path(out).mkdir(parents=True)
    save_file(state, Path(out) / "model.safetensors")


def _voxels(path: Path) -> NDArray[Any]:
    import nibabel

    image: Any = nibabel.load(path)
    return np.asarray(image.dataobj)


def fedneuro_arm(data: str, out: str) -> None:
    """The job as a study, through the in-process engine with one worker."""
    from ...privacy.study import Study
    from ..run import Simulation

    study = Study.parse(
        {
            "study": {"name": "overhead"},
            "data": {"patch": [SIDE] * 3, "foreground": 0.0, "augment": "none"},
            "model": {"name": "unet", "dims": 3, "channels": [16, 32, 64, 128], "residual_units": 2},
            "training": {"rounds": ROUNDS, "local_epochs": 1, "batch_size": 2, "learning_rate": 1e-3},
            "privacy": {"mode": "none"},
            "evaluation": {"every": 0, "validation_fraction": 1e-9, "metrics": ["dice"]},
        }
    )
    Simulation(study=study, sites=Path(data), out=Path(out), workers=1).run()


def idle_arm(data: str, out: str) -> None:
    """Thirty rounds of a 50 MB model over four sites that send back what they got, checked and saved as always."""
    import psutil

    from ...privacy.contract import EvaluateReply, HelloReply, Role, TrainReply, check_arrays, shapes_of
    from ...privacy.study import Study
    from ...server import rounds as server_rounds
    from ...server.events import Event
    from ...server.store import RunStore

    del data
    study = Study.parse(
        {
            "study": {"name": "idle"},
            "data": {"patch": [16, 16]},
            "model": {"channels": [256, 1020], "residual_units": 2},
            "training": {"rounds": 30, "local_steps": 1},
            "privacy": {"mode": "none"},
            "evaluation": {"every": 0},
        }
    )

    class Echo:
        def sites(self) -> list[str]:
            return [f"site-{i}" for i in range(CLIENTS)]

        def exchange(self, requests: Any, timeout: float) -> Any:
            del timeout
            for name, request in requests.items():
                if request.kind == "hello":
                    yield HelloReply(site=name, role=Role.TRAIN, public_size=20)
                elif request.kind == "evaluate":
                    yield EvaluateReply(site=name, round=request.round, metrics={}, seconds=0.0)
                else:
                    check_arrays(request.arrays, shapes_of(request.arrays))
                    copies = {key: value.copy() for key, value in request.arrays.items()}
                    yield TrainReply(site=name, round=request.round, arrays=copies, steps=0, seconds=0.0)

    memory: list[float] = []

    def watch(event: Event) -> None:
        if event.kind == "round-done":
            memory.append(psutil.Process().memory_info().rss / 1e6)

    store = RunStore.create(Path(out), study, engine="echo")
    server_rounds.run_study(study, Echo(), store, watch)
    seconds = [record.seconds for record in store.rounds()[1:]]
    size = sum(array.nbytes for array in store.groups(30)["model"].values()) / 1e6
    figures = {
        "model_mb": size,
        "seconds_per_round": median(seconds),
        "first_ten_rounds": sum(seconds[:10]),
        "resident_mb_round_5": memory[4],
        "resident_mb_round_30": memory[29],
    }
    print(json.dumps(figures))


ARMS = {"plain": plain_arm, "fedneuro": fedneuro_arm, "idle": idle_arm}

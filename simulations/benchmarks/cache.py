# SPDX-License-Identifier: Apache-2.0
"""The cache of preprocessed scans beside MONAI's: building, reading, memory, and how long training waits for data.

All arms prepare the same files in the same way: turn to RAS+, resample, standardise the voxels that are not 0, stack
the modalities; the largest difference of the results is told. Each arm runs in a process of its own, the folder's files
are in the system's page cache for all of them, and building uses two workers everywhere. *Reading* touches every
voxel of every scan: the first pass of a new process, which for ours tests check sums, and the passes after it. *Memory*
is what reading everything adds to a process: of its own (anonymous), and with the pages that it maps. *Waiting* is the
share of a training loop's time that is spent on the next batch, on this machine's CPU.
"""

import json
import multiprocessing
import os
import resource
import shutil
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, Final

import numpy as np

from ...privacy.study import Study

__all__ = ["bench_cache"]

SPACING: Final = (1.2, 1.2, 1.5)
PASSES: Final = 3
MODALITIES: Final = ("FLAIR", "T1w")


def bench_cache(
    json_path: Path | None = None, *, patients: int = 16, side: int = 128, steps: int = 30, repeats: int = 3
) -> dict[str, Any]:
    """Measure the arms in turn, ``repeats`` times, and return (and save) medians and ratios.

    Args:
        json_path: where to save the figures.
        patients: of the made-up data set, two modalities each.
        side: voxels of an image along x and y; three quarters of it along z.
        steps: of the training loops.
        repeats: the order of the arms alternates.
    """
    with tempfile.TemporaryDirectory(prefix="fedneuro-bench-") as scratch:
        root = Path(scratch, "site")
        _write_site(root, patients, side)
        found: dict[str, Any] = {"patients": patients, "voxels": [side, side, side * 3 // 4], "processes": 2}
        runs: dict[str, list[dict[str, float]]] = {"ours": [], "persistent": [], "in_memory": []}
        for number in range(repeats):
            for arm in list(runs) if number % 2 == 0 else list(reversed(runs)):
                folder = Path(scratch, f"cache-{arm}")
                shutil.rmtree(folder, ignore_errors=True)
                runs[arm].append(_alone(_arm, arm, str(root), str(folder)))
        for arm, results in runs.items():
            found[arm] = {key: round(float(np.median([r[key] for r in results])), 4) for key in results[0]}
        ours, other = found["ours"], found["persistent"]
        found["building_over_persistent"] = round(other["build_s"] / ours["build_s"], 2)
        found["building_cpu_over_persistent"] = round(other["build_cpu_s"] / ours["build_cpu_s"], 2)
        found["first_reading_over_persistent"] = round(other["first_pass_s"] / ours["first_pass_s"], 2)
        found["reading_over_persistent"] = round(other["pass_s"] / ours["pass_s"], 2)
        found["own_memory_over_in_memory"] = round(ours["own_mib"] / found["in_memory"]["own_mib"], 3)
        found["all_memory_over_in_memory"] = round(ours["all_mib"] / found["in_memory"]["all_mib"], 3)
        found["largest_difference"] = _alone(_difference, str(root), str(Path(scratch, "cache-ours")))
        found["waiting"] = {
            name: _alone(_waiting, str(root), str(Path(scratch, "cache-ours")), name, steps) for name in _LOOPS
        }
    if json_path:
        json_path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return found


def _alone(function: Any, *arguments: Any) -> Any:
    """The result of a function in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def _write_site(root: Path, patients: int, side: int) -> None:
    """Heads of noise: an ellipsoid of smooth grey values, air of exactly 0, a ball as the mask, 12-bit integers."""
    import nibabel
    from scipy.ndimage import gaussian_filter

    nib: Any = nibabel
    shape = (side, side, side * 3 // 4)
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij"))
    head = (grid**2).sum(axis=0) < 0.8
    affine = np.diag([-1.0, -1.0, 1.5, 1.0])  # stored LPS, as scanners do
    for number in range(patients):
        rng = np.random.default_rng(number)
        name = f"sub-{number:03d}"
        ball = (((grid.T - rng.uniform(-0.4, 0.4, 3)).T) ** 2).sum(axis=0) < 0.03
        files = {root / "derivatives/manual" / name / "anat" / f"{name}_label-lesion_mask.nii.gz": ball}
        for modality in MODALITIES:
            grey = gaussian_filter(rng.normal(0, 400, shape), 1.5) + 900 + 300 * ball
            files[root / name / "anat" / f"{name}_{modality}.nii.gz"] = np.where(head, np.clip(grey, 1, 4095), 0)
        for path, data in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            image = nib.Nifti1Image(data.astype(np.uint8 if data.dtype == bool else np.int16), affine)
            image.header.set_xyzt_units("mm", "sec")
            nib.save(image, path)
    (root / "dataset_description.json").write_text('{"Name": "bench", "BIDSVersion": "1.10.0"}\n')


def _study(**changes: dict[str, Any]) -> Study:
    values: dict[str, Any] = {
        "study": {"name": "bench"},
        "data": {"modalities": list(MODALITIES), "spacing": list(SPACING)},
        "training": {"local_steps": 1},
        "privacy": {"mode": "none"},
    }
    for section, keys in changes.items():
        values[section] = values.get(section, {}) | keys
    return Study.parse(values)


def _arm(arm: str, root: str, folder: str) -> dict[str, float]:
    """Build, then read everything a few times."""
    import torch

    torch.set_num_threads(1)
    _warm(root, arm)
    started, before = time.perf_counter(), _cpu()
    if arm == "ours":
        _open(root, folder, workers=2)
    else:
        _monai(arm, root, folder)
    found = {"build_s": time.perf_counter() - started, "build_cpu_s": _cpu() - before}
    read: dict[str, float] = _alone(_reader, arm, root, folder)
    return found | read


def _cpu() -> float:
    """CPU seconds of this process and of its children that have ended: what counts where others use the machine too."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def _warm(root: str, arm: str) -> None:
    """Everything is imported, and the files are in the page cache."""
    if arm == "ours":
        from monai.transforms.spatial import dictionary  # noqa: F401

        from ...client.data import opening  # noqa: F401
    else:
        _transforms()
    for path in Path(root).rglob("*.nii.gz"):
        path.read_bytes()


def _reader(arm: str, root: str, folder: str) -> dict[str, float]:
    import torch

    torch.set_num_threads(1)
    _warm(root, arm)
    before = _memory()
    if arm == "ours":
        site = _open(root, folder)

        def ours() -> float:
            return sum(
                float(scan.image.sum()) + float(scan.mask.sum())
                for patient in site.patients
                for scan in site.prepared(patient)
                if scan.mask is not None
            )

        return _reading(ours, before)
    held = _monai(arm, root, folder, build=False)
    return _reading(lambda: _monai_pass(held), before)


def _reading(one_pass: Any, before: tuple[float, float]) -> dict[str, float]:
    seconds = []
    for _ in range(1 + PASSES):
        started = time.perf_counter()
        one_pass()
        seconds.append(time.perf_counter() - started)
    own, mapped = _memory()
    return {
        "first_pass_s": seconds[0],
        "pass_s": float(np.median(seconds[1:])),
        "own_mib": own - before[0],
        "all_mib": own + mapped - sum(before),
    }


def _memory() -> tuple[float, float]:
    """Anonymous and mapped memory of this process, MiB."""
    values = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    own, mapped = (float(values[key].split()[0]) / 1024 for key in ("RssAnon", "RssFile"))
    return own, mapped


def _open(root: str, folder: str, *, workers: int = 1) -> Any:
    from ...client.data import open_site

    return open_site(Path(root), _study(), cache=Path(folder), workers=workers)


def _transforms() -> Any:
    from monai.transforms.compose import Compose
    from monai.transforms.intensity.dictionary import NormalizeIntensityd
    from monai.transforms.io.dictionary import LoadImaged
    from monai.transforms.spatial.dictionary import Orientationd, Spacingd
    from monai.transforms.utility.dictionary import ConcatItemsd, DeleteItemsd, EnsureChannelFirstd

    keys = [*MODALITIES, "label"]
    modes = ["bilinear"] * len(MODALITIES) + ["nearest"]
    return Compose(
        [
            LoadImaged(keys),
            EnsureChannelFirstd(keys),
            Orientationd(keys, axcodes="RAS", labels=None),
            Spacingd(keys, pixdim=SPACING, mode=modes, padding_mode="border"),
            NormalizeIntensityd(MODALITIES, nonzero=True, channel_wise=True),
            ConcatItemsd(MODALITIES, name="image"),
            DeleteItemsd(MODALITIES),
        ]
    )


def _monai(arm: str, root: str, folder: str, *, build: bool = True) -> Any:
    """MONAI's data set, its scans prepared by two processes where that can be."""
    import torch
    from monai.data.dataset import CacheDataset, PersistentDataset

    items = []
    for patient in sorted(Path(root).glob("sub-*")):
        images = {m: str(patient / "anat" / f"{patient.name}_{m}.nii.gz") for m in MODALITIES}
        mask = Path(root, "derivatives/manual", patient.name, "anat", f"{patient.name}_label-lesion_mask.nii.gz")
        items.append({**images, "label": str(mask)})
    if arm == "in_memory":
        return CacheDataset(items, _transforms(), num_workers=2, progress=False)
    held = PersistentDataset(items, _transforms(), cache_dir=folder)
    if build:
        # fork is what it does by itself on Linux, but not within a process that was spawned, as this one.
        loader = torch.utils.data.DataLoader(
            held, batch_size=None, num_workers=2, collate_fn=_nothing, multiprocessing_context="fork"
        )
        for _ in loader:
            pass
    return held


def _nothing(_: Any) -> int:
    """The scan stays in the process that prepared it: only the file on disk is wanted."""
    return 0


def _monai_pass(held: Any) -> float:
    return sum(float(held[i]["image"].sum()) + float(held[i]["label"].sum()) for i in range(len(held)))


def _difference(root: str, folder: str) -> float:
    """Largest difference between our image and MONAI's, over the first two scans."""
    site, items = _open(root, folder), _monai("persistent", root, folder + "-check", build=False)
    return max(
        float((site.prepared(patient)[0].image - items[i]["image"].as_tensor()).abs().max())
        for i, patient in enumerate(site.patients[:2])
    )


_LOOPS: Final[dict[str, dict[str, dict[str, Any]]]] = {
    "slices, light": {"data": {"augment": "light"}},
    "slices, standard": {"data": {"augment": "standard"}},
    "volumes, custom": {
        "data": {
            "patch": [64, 64, 64],
            "augment": "custom",
            "augmentation": {"elastic": 0.3, "bias": 0.3, "low_resolution": 0.3},
        },
        "model": {"dims": 3, "channels": [16, 32, 64]},
        "training": {"batch_size": 2},
    },
}


def _waiting(root: str, folder: str, name: str, steps: int) -> dict[str, float]:
    """The loop of :mod:`fedneuro.client.training`, its time parted in waiting and computing."""
    import torch

    from ...client.data import Crops, open_site
    from ...client.data.ahead import ahead
    from ...models.losses import build_loss
    from ...models.networks import build_network

    torch.set_num_threads(1)
    study = _study(**_LOOPS[name])
    site = open_site(Path(root), study, cache=Path(folder))
    crops = Crops(site, site.patients, study)
    network = build_network(study.model, in_channels=len(MODALITIES), out_channels=2, seed=0)
    loss_of = build_loss(study.training.loss, study.task)
    optimizer = torch.optim.Adam(network.parameters())
    rng = np.random.default_rng(0)

    def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for _ in range(steps):
            yield crops.batch(study.training.batch_size, rng)

    drawn = time.perf_counter()
    for _ in batches():
        pass
    alone = (time.perf_counter() - drawn) / steps
    waited = 0.0
    started = before = time.perf_counter()
    for images, labels in ahead(batches()):
        waited += time.perf_counter() - before
        optimizer.zero_grad(set_to_none=True)
        loss_of(network(images), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        before = time.perf_counter()
    total = time.perf_counter() - started
    return {
        "share": round(waited / total, 4),
        "step_ms": round(1000 * total / steps, 1),
        "crops_ms": round(1000 * alone, 1),
        "cores": float(len(os.sched_getaffinity(0))),
    }

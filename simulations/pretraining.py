# SPDX-License-Identifier: Apache-2.0
"""Public pre-training: the study's own network, loss and patch on synthetic heads, before any hospital trains.

It costs no privacy, as nobody's scan has a part in it, and it decides what private training can reach
(``docs/privacy.md``): few private steps under noise can adjust a network that knows lesions, hardly make one.

The run is deterministic (CPU: one thread; the same bits on the same kind of machine) and cached by everything
that its result depends on. The result is the model of round 0, which is judged at every hospital first.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from ..models.losses import build_loss
from ..models.networks import build_network
from ..models.state import digest, load_saved, save_arrays, to_arrays
from ..privacy.contract import Arrays
from ..privacy.errors import EnvironmentProblem, FedNeuroError, Reason, StudyError
from ..privacy.study import Study
from ..server.events import Event, Observer, ignore
from .phantoms.anatomy import FIELD_OF_VIEW_MM, Grid
from .phantoms.variety import Head, Variety, contrast_of, draw_head

__all__ = ["initial_state", "pretrain", "recipe", "variety_of"]

FORMAT: Final = 1
"""Version of what is made here and in :mod:`.phantoms.variety`. Raise it with every change of the result."""

AXES: Final = {"sagittal": 0, "coronal": 1, "axial": 2}
SLICE_MM: Final = 4.5
"""Distance of slices where the study does not say: clinical scans are thick."""
VOLUME_MM: Final = 2.0
FINEST_MM: Final = 1.5
"""Heads are not made finer than this: the template shows no more."""
STEPS_PER_EVENT: Final = 10


def initial_state(study: Study, cache: Path, observer: Observer = ignore) -> Arrays | None:
    """The model that round 0 starts from by ``[training.init]``; None for an untrained network.

    Args:
        study: the study.
        cache: folder in which pre-trained models are kept.
        observer: told of the steps of pre-training.

    Raises:
        StudyError: the checkpoint cannot be read, or is not the one that the study names.
        EnvironmentProblem: the cache cannot be written.
    """
    source = study.training.init.source
    if source == "checkpoint":
        return _checkpoint(study)
    if not source:
        return None
    key = hashlib.sha256(json.dumps(recipe(study), sort_keys=True).encode()).hexdigest()
    path = cache / f"{key}.safetensors"
    if (found := _cached(path)) is not None:
        return found
    arrays = pretrain(study, observer)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        save_arrays(path, arrays, {"recipe": json.dumps(recipe(study), sort_keys=True), "digest": digest(arrays)})
    except OSError as error:
        text = f"{cache}: the pre-trained model cannot be saved ({error.strerror or error})"
        raise EnvironmentProblem(f"{text}; free space, or give another --cache") from error
    return arrays


def recipe(study: Study) -> Mapping[str, Any]:
    """Everything that the result of :func:`pretrain` depends on, and nothing else."""
    values, training = study.model_dump(mode="json"), study.training
    init = {key: value for key, value in values["training"]["init"].items() if key != "sha256"}
    data = ("modalities", "spacing", "normalise", "patch", "slice_axis", "foreground")
    return {
        "format": FORMAT,
        "init": init,
        "model": values["model"],
        "data": {key: values["data"][key] for key in data} | {"flip": study.data.augment != "none"},
        "training": {"loss": training.loss, "precision": training.precision},
        "seed": study.study.seed,
        "device": _device(study).type,
        "libraries": {name: version(name) for name in ("monai", "nilearn", "numpy", "scipy", "torch")},
    }


def pretrain(study: Study, observer: Observer = ignore) -> Arrays:
    """Train the study's network on phantoms with Adam, its rate falling to zero as a cosine.

    Args:
        study: with ``training.init.from = "phantoms"``.
        observer: told of the steps.

    Raises:
        FedNeuroError: the loss is not finite.
    """
    init, device = study.training.init, _device(study)

    def tell(step: int) -> None:
        observer(Event(kind="pre-training", values={"step": step, "steps": init.steps}))

    tell(0)
    with _one_thread(), torch.random.fork_rng(devices=[]):
        crops = variety_of(study)
        network = build_network(
            study.model, in_channels=len(study.data.modalities), out_channels=study.task.channels, seed=study.study.seed
        ).to(device)
        torch.manual_seed(init.seed)  # drop-out
        loss_of, random = build_loss(study.training.loss, study.task), torch.Generator().manual_seed(init.seed)
        optimizer = torch.optim.Adam(network.parameters(), init.learning_rate)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / init.steps))
        )
        bfloat16 = study.training.precision == "bfloat16"
        network.train()
        for step in range(init.steps):
            images, labels = crops.batch(init.batch_size, random)
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bfloat16):
                logits = network(images.to(device))
            loss = loss_of(logits.float(), labels.to(device))
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            if step % STEPS_PER_EVENT == STEPS_PER_EVENT - 1:
                tell(min(step + 1, init.steps - 1))
        arrays = to_arrays(network)
    if not all(np.isfinite(array).all() for array in arrays.values()):
        raise FedNeuroError(
            "pre-training on phantoms did not stay finite; lower training.init.learning_rate", reason=Reason.NON_FINITE
        )
    tell(init.steps)
    return arrays


def variety_of(study: Study) -> Variety:
    """Crops of phantoms that suit the study: its patch, slices, channels and normalisation."""
    init, data = study.training.init, study.data
    grid, ratio = _grid(study)
    heads: list[Head] = [draw_head(init.seed, number, grid, init.lesions) for number in range(init.patients)]
    return Variety(
        heads,
        patch=data.patch,
        axis=AXES[data.slice_axis],
        ratio=ratio,
        contrasts=[contrast_of(modality, init.contrast) for modality in data.modalities],
        foreground=data.foreground,
        percentile=data.normalise == "percentile",
        flip=data.augment != "none",
    )


def _grid(study: Study) -> tuple[Grid, float]:
    """The grid on which heads are made, and how many of its voxels a voxel of the patch spans."""
    init, data, axis = study.training.init, study.data, AXES[study.data.slice_axis]
    planar = study.model.dims == 2
    within = [size for side, size in enumerate(data.spacing) if side != axis or not planar]
    if init.voxel_mm:
        wanted = init.voxel_mm
    elif within:
        wanted = float(np.mean(within))
    elif planar:
        wanted = max(FIELD_OF_VIEW_MM) / max(data.patch)
    else:
        wanted = VOLUME_MM
    fine = max(wanted, FINEST_MM)
    sides = [fine, fine, fine]
    if planar:
        sides[axis] = max(data.spacing[axis] if data.spacing else SLICE_MM, FINEST_MM)
    return Grid.covering_head((sides[0], sides[1], sides[2])), wanted / fine


def _checkpoint(study: Study) -> Arrays:
    init = study.training.init
    if not init.path:
        raise StudyError(
            "training.init.path: missing; expected the file of the checkpoint: --set 'training.init.path=\"FILE\"'"
        )
    path = Path(init.path)
    try:
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        if found != init.sha256:
            text = f"training.init.path: {path} has SHA-256 {found[:12]}…, the study names {init.sha256[:12]}…"
            raise StudyError(f"{text}; give the file that the study means, or correct training.init.sha256")
        return load_saved(path)[0]
    except OSError as error:
        raise StudyError(f"training.init.path: {path} cannot be read ({error.strerror or error})") from error
    except ValueError as error:
        text = f"training.init.path: {path} is not a safetensors file"
        raise StudyError(f"{text}; expected a model.safetensors that a run wrote") from error


def _cached(path: Path) -> Arrays | None:
    """The arrays in a cache's entry; None where there is none, or a damaged one."""
    try:
        arrays, metadata = load_saved(path)
    except (OSError, ValueError):
        return None
    return arrays if digest(arrays) == metadata.get("digest") else None


def _device(study: Study) -> torch.device:
    return torch.device("cuda" if study.training.device != "cpu" and torch.cuda.is_available() else "cpu")


@contextmanager
def _one_thread() -> Iterator[None]:
    """Sums in torch depend on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)

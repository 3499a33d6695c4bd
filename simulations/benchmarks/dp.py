# SPDX-License-Identifier: Apache-2.0
"""What a private step costs beside a plain one: this engine and Opacus' three ways, interleaved in one run.

A step is forward, backward, clipping, sum, noise and SGD on ready-made crops; loss: cross entropy. Cases are
``patients x crops`` on three networks. Opacus clips per crop, so it takes part only where a patient has one;
its noise comes from PyTorch's ordinary generator, ours from a cryptographic one, which is included. ``auto`` is what a
study would take on this machine. Times are of the process (one thread), which other programs disturb less; the wall's
ratio is beside it. Memory is the growth of the resident peak over one step, each arm in a process of its own.

Ratios are to the plain float32 step of the network as MONAI and PyTorch have it, which is what Opacus gets, too. Ours
has layers of its own (:mod:`fedneuro.models.networks.fast`) of the same formula; the plain step with these is a row.
Seconds depend on the machine.
"""

import json
import multiprocessing
import resource
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...models.networks import build_network
from ...models.spec import ModelSection
from ...privacy.dpsgd import Loop, PatientGradient, Vmap, choose_path, fix
from ...privacy.noise import SecureRandom

__all__ = ["bench_dp"]

Device = Literal["cpu", "cuda"]
Step = Callable[[], None]
Arm = Callable[[nn.Module, Tensor, Tensor], Step]

REPEATS = 5
CLIP, SIGMA, RATE = 1.0, 1.0, 1e-3
STEPS = 10_000  # that a study would take: decides whether a trial is worth its time
FULL = 1e6  # patients of the trial: groups are full here, a study pays for the last one of a step


def bench_dp(json_path: Path | None = None, *, repeats: int = REPEATS, device: Device = "cpu") -> dict[str, Any]:
    """Run all cases and return (and save) the figures.

    Args:
        json_path: where to save them.
        repeats: timed steps per arm, after one to warm up; their median counts.
        device: ``cuda`` needs a GPU.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    found: dict[str, Any] = {"device": device, "torch": torch.__version__, "cases": {}}
    for case in CASES:
        found["cases"][case] = _measure(case, repeats, device)
        if json_path:  # after each case, so that a stop leaves what was measured
            json_path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    found["targets"] = _judge(found["cases"])
    if json_path:
        json_path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return found


# -- cases -------------------------------------------------------------------------------------------------


def unet(dims: Literal[2, 3]) -> nn.Module:
    """The study's U-Net in its default size."""
    model = ModelSection(name="unet", dims=dims, channels=(16, 32, 64, 128), residual_units=2)
    return build_network(model, in_channels=1, out_channels=2, seed=0)


def resnet() -> nn.Module:
    """MONAI's ResNet 10 as it comes, its BatchNorms replaced."""
    from monai.networks.nets.resnet import resnet10

    return fix(resnet10(spatial_dims=3, n_input_channels=1, num_classes=2))


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int, int]] = {
    "UNet3D 48³ 4x1": (partial(unet, 3), (48, 48, 48), 4, 1),
    "UNet3D 48³ 2x4": (partial(unet, 3), (48, 48, 48), 2, 4),
    "UNet2D 128² 16x1": (partial(unet, 2), (128, 128), 16, 1),
    "UNet2D 128² 4x4": (partial(unet, 2), (128, 128), 4, 4),
    "ResNet10 3D 64³ 2x1": (resnet, (64, 64, 64), 2, 1),
}
"""Network, patch, patients, crops per patient."""


def _crops(case: str, device: Device) -> tuple[nn.Module, Tensor, Tensor]:
    build, patch, patients, crops = CASES[case]
    images = torch.randn((patients, crops, 1, *patch), device=device)
    size = patch if case.startswith("UNet") else ()
    labels = torch.randint(2, (patients, crops, *size), device=device)
    return build().to(device), images, labels


# -- arms --------------------------------------------------------------------------------------------------


def stock(network: nn.Module) -> nn.Module:
    """The network with PyTorch's own layers in place of the fast ones; they differ in ``forward`` only."""
    own: tuple[Any, ...] = (nn.PReLU, nn.Conv2d, nn.InstanceNorm2d, nn.InstanceNorm3d)
    for module in network.modules():
        for kind in own:
            if isinstance(module, kind):
                module.__class__ = kind
    return network


def plain(
    network: nn.Module, images: Tensor, labels: Tensor, dtype: torch.dtype | None = None, *, fast: bool = False
) -> Step:
    """All crops in one batch, no privacy."""
    network = network if fast else stock(network)
    optimizer = torch.optim.SGD(network.parameters(), RATE)
    inputs, truth = images.flatten(0, 1), labels.flatten(0, 1)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(inputs.device.type, dtype=dtype, enabled=dtype is not None):
            logits = network(inputs)
        F.cross_entropy(logits.float(), truth).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def engine(network: nn.Module, images: Tensor, labels: Tensor, *, kind: str, dtype: torch.dtype | None = None) -> Step:
    """This engine: ``auto``, ``loop``, or ``vmap`` (four at once)."""
    path: Any
    if kind == "auto":
        patients, shape = len(images), tuple(images.shape[1:])
        choice = choose_path(
            network, F.cross_entropy, shape, autocast=dtype, expected_patients=FULL, steps=STEPS,
            most_patients=min(4, patients),
        )  # fmt: skip
        path = choice.path
    elif kind == "loop":
        path = Loop(network, F.cross_entropy, autocast=dtype)
    else:
        path = Vmap(network, F.cross_entropy, patients=min(4, len(images)), autocast=dtype)
    return _private(network, images, labels, path)


def _private(network: nn.Module, images: Tensor, labels: Tensor, path: Any) -> Step:
    optimizer = torch.optim.SGD(network.parameters(), RATE)
    gradient = PatientGradient(
        network,
        F.cross_entropy,
        clip=CLIP,
        noise_multiplier=SIGMA,
        expected_patients=len(images),
        random=SecureRandom(),
        path=path,
    )

    def step() -> None:
        for patient, truth in zip(images, labels, strict=True):
            gradient.accumulate(patient, truth)
        gradient.finish()
        optimizer.step()

    step.__doc__ = path.name
    return step


def opacus(network: nn.Module, images: Tensor, labels: Tensor, *, functorch: bool = False) -> Step:
    """Opacus' per-sample gradients, by its hooks or by functorch per layer."""
    from opacus import GradSampleModule
    from opacus.optimizers import DPOptimizer

    model: Any = GradSampleModule(stock(network), force_functorch=functorch)
    optimizer: Any = DPOptimizer(
        torch.optim.SGD(model.parameters(), RATE),
        noise_multiplier=SIGMA,
        max_grad_norm=CLIP,
        expected_batch_size=len(images),
    )
    inputs, truth = images.flatten(0, 1), labels.flatten(0, 1)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(model(inputs), truth).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def opacus_ghost(network: nn.Module, images: Tensor, labels: Tensor) -> Step:
    """Opacus' ghost clipping: two backward passes, per-sample norms."""
    from opacus.grad_sample import GradSampleModuleFastGradientClipping
    from opacus.optimizers.optimizer_fast_gradient_clipping import DPOptimizerFastGradientClipping
    from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping

    model: Any = GradSampleModuleFastGradientClipping(stock(network), max_grad_norm=1, use_ghost_clipping=True)
    optimizer: Any = DPOptimizerFastGradientClipping(
        torch.optim.SGD(model.parameters(), RATE),
        noise_multiplier=SIGMA,
        max_grad_norm=CLIP,
        expected_batch_size=len(images),
    )

    def voxels(logits: Tensor, truth: Tensor, reduction: str = "mean") -> Tensor:
        losses = F.cross_entropy(logits, truth, reduction="none").flatten(1).mean(1)
        return losses if reduction == "none" else losses.mean()

    class PerSample(nn.Module):
        reduction = "mean"

        def forward(self, logits: Tensor, truth: Tensor) -> Tensor:
            return voxels(logits, truth, self.reduction)

    criterion: Any = DPLossFastGradientClipping(model, optimizer, PerSample(), "mean")
    inputs, truth = images.flatten(0, 1), labels.flatten(0, 1)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        criterion(model(inputs), truth).backward()
        optimizer.step()

    return step


OPACUS: dict[str, Arm] = {
    "opacus hooks": opacus,
    "opacus functorch": partial(opacus, functorch=True),
    "opacus ghost": opacus_ghost,
}
BFLOAT16 = torch.bfloat16
OURS: dict[str, Arm] = {
    "plain": plain,
    "plain, fast layers": partial(plain, fast=True),
    "loop": partial(engine, kind="loop"),
    "vmap": partial(engine, kind="vmap"),
    "auto": partial(engine, kind="auto"),
    "plain bfloat16": partial(plain, dtype=BFLOAT16),
    "auto bfloat16": partial(engine, kind="auto", dtype=BFLOAT16),
}
MEASURED = ("plain", "auto", "auto bfloat16", "opacus hooks")
"""Arms whose memory is measured."""


def _arms(case: str) -> dict[str, Arm]:
    return OURS | OPACUS if CASES[case][3] == 1 else OURS


# -- measuring ---------------------------------------------------------------------------------------------


def _measure(case: str, repeats: int, device: Device) -> dict[str, Any]:
    steps: dict[str, Step] = {}
    rows: dict[str, dict[str, Any]] = {}
    for name, arm in _arms(case).items():
        network, images, labels = _crops(case, device)
        rows[name] = {}
        try:
            steps[name] = arm(network, images, labels)
            steps[name]()  # to warm up
        except Exception as error:  # what a library cannot do is a finding
            steps.pop(name, None)
            text = str(error).strip().splitlines()
            rows[name] = {"fails": f"{type(error).__name__}: {text[0][:120] if text else ''}"}
            continue
        if name.startswith("auto"):
            rows[name]["path"] = steps[name].__doc__
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            start = time.process_time(), time.perf_counter()
            step()
            if device == "cuda":
                torch.cuda.synchronize()
            times[name].append((time.process_time() - start[0], time.perf_counter() - start[1]))
    for name, taken in times.items():
        rows[name] |= {"cpu_seconds": median(t[0] for t in taken), "wall_seconds": median(t[1] for t in taken)}
        if name in MEASURED and (peak := _memory(case, name, rows[name].get("path", ""), device)) is not None:
            rows[name]["peak_mb"] = peak
    clock = "wall" if device == "cuda" else "cpu"
    for row in rows.values():
        if "fails" not in row:
            row["ratio"] = row[f"{clock}_seconds"] / rows["plain"][f"{clock}_seconds"]
            row["wall_ratio"] = row["wall_seconds"] / rows["plain"]["wall_seconds"]
        if "peak_mb" in row:
            row["memory_ratio"] = row["peak_mb"] / rows["plain"]["peak_mb"]
    return rows


def _memory(case: str, name: str, path: str, device: Device) -> float | None:
    """Growth of the peak over one step in MB; of ``auto`` with the path that it took, for its trial is not the step."""
    arm = _arms(case)[name]
    if name.startswith("auto"):
        arm = partial(_as_chosen, path=path, dtype=BFLOAT16 if "bfloat16" in name else None)
    if device == "cuda":
        return _on_gpu(case, arm)
    # From a fork server: it has imported everything and computed nothing, so no freed memory hides what a step takes.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_in_child, args=(case, arm, sender))
    child.start()
    sender.close()
    try:
        grown: float = receiver.recv()
    except EOFError:
        return None
    finally:
        child.join()
    return grown


def _as_chosen(network: nn.Module, images: Tensor, labels: Tensor, *, path: str, dtype: torch.dtype | None) -> Step:
    if path.startswith("loop"):
        taken: Any = Loop(network, F.cross_entropy, autocast=dtype, channels_last="last" in path)
    else:
        taken = Vmap(network, F.cross_entropy, patients=int(path.split()[1]), autocast=dtype)
    return _private(network, images, labels, taken)


def _on_gpu(case: str, arm: Arm) -> float:
    step = arm(*_crops(case, "cuda"))
    step()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def _in_child(case: str, arm: Arm, sender: Any) -> None:
    torch.set_num_threads(1)
    crops = _crops(case, "cpu")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    arm(*crops)()
    sender.send((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / 1e6)


def _judge(cases: dict[str, Any]) -> dict[str, Any]:
    """The goals, and what was reached."""
    three = cases["UNet3D 48³ 4x1"]
    opacus_best = min(three[name].get("ratio", float("inf")) for name in OPACUS)
    return {
        "one crop <= 1.25": {c: r["auto"]["ratio"] for c, r in cases.items() if c.endswith("x1")},
        "four crops <= 1.0": {c: r["auto"]["ratio"] for c, r in cases.items() if c.endswith("x4")},
        "memory <= 1.1": {c: r["auto"].get("memory_ratio") for c, r in cases.items()},
        "faster than the best of Opacus on UNet3D >= 1.8": opacus_best / three["auto"]["ratio"],
    }

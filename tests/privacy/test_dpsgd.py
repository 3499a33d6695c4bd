# SPDX-License-Identifier: Apache-2.0
"""The private gradient: bounded by one patient, noised as promised, and tests that notice when it is not."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from fedneuro.models.losses import LOSSES, build_loss
from fedneuro.models.networks import build_network
from fedneuro.models.spec import SUITED_LOSSES, ModelSection, TaskSection
from fedneuro.privacy.dpsgd import (
    Loss,
    PatientGradient,
    check_network,
    largest_contribution,
    self_test,
    synthetic_patients,
)
from fedneuro.privacy.dpsgd.proof import _check_apart
from fedneuro.privacy.errors import BadInput, Refused
from fedneuro.privacy.noise import SecureRandom

Patient = tuple[Tensor, Tensor]

NETWORKS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "unet-2d": ({"name": "unet", "dims": 2, "channels": (4, 8, 16)}, (2, 1, 16, 16)),
    "unet-2d-group": ({"name": "unet", "dims": 2, "channels": (4, 8), "norm": "group"}, (2, 1, 16, 16)),
    "unet-2d-dropout": ({"name": "unet", "dims": 2, "channels": (4, 8), "dropout": 0.5}, (2, 1, 16, 16)),
    "unet-3d": ({"name": "unet", "dims": 3, "channels": (4, 8)}, (2, 1, 8, 8, 8)),
    "resnet-2d": ({"name": "resnet", "dims": 2, "channels": (4, 4, 8, 8), "norm": "group"}, (2, 1, 32, 32)),
    "resnet-3d": ({"name": "resnet", "dims": 3, "channels": (4, 4, 8, 8), "norm": "group"}, (2, 1, 32, 32, 32)),
    "resnet-2d-instance": ({"name": "resnet", "dims": 2, "channels": (4, 4, 8, 8)}, (2, 1, 64, 64)),
}
TASKS = {
    "segmentation": TaskSection(),
    "classification": TaskSection(kind="classification", labels=("a", "b"), target="t"),
    "regression": TaskSection(kind="regression", target="t"),
    "survival": TaskSection(kind="survival", target="t", event="e", time_cuts=(1.0, 2.0)),
}
CASES = [
    (network, loss)
    for network in NETWORKS
    for loss in LOSSES
    if network.startswith("unet") == (loss in SUITED_LOSSES["segmentation"]) or loss in SUITED_LOSSES["classification"]
]


def make(case: str, loss: str = "cross_entropy") -> tuple[nn.Module, Loss, tuple[int, ...]]:
    values, shape = NETWORKS[case]
    kinds = ["segmentation"] if case.startswith("unet") else list(TASKS)[1:]
    task = next(TASKS[kind] for kind in kinds if loss in SUITED_LOSSES[kind])
    return build_network(ModelSection(**values), in_channels=1, out_channels=2, seed=0), build_loss(loss, task), shape


def engine_for(network: nn.Module, loss: Loss, **values: Any) -> PatientGradient:
    settings: dict[str, Any] = {
        "clip": 0.05,
        "noise_multiplier": 1.0,
        "expected_patients": 4.0,
        "random": SecureRandom(),
    }
    return PatientGradient(network, loss, **{**settings, **values})


def clipped_sum(network: nn.Module, loss: Loss, clip: float, patients: Sequence[Patient]) -> Tensor:
    """The engine's own sum before noise."""
    engine = engine_for(network, loss, clip=clip)
    for images, labels in patients:
        engine.accumulate(images, labels)
    return engine.take_sum()


def patient_gradient(network: nn.Module, loss: Loss, patient: Patient) -> Tensor:
    """Brute force: the flat float64 gradient of one patient's mean loss."""
    gradients = torch.autograd.grad(loss(network(patient[0]), patient[1]), list(network.parameters()))
    return torch.cat([g.reshape(-1) for g in gradients]).double()


@pytest.mark.parametrize(("case", "loss_name"), CASES)
def test_no_patient_moves_the_sum_by_more_than_the_clip(case: str, loss_name: str) -> None:
    """Leave one out, with an outlier among the patients, through the code that trains."""
    network, loss, shape = make(case, loss_name)
    self_test(network, loss, shape, clip=0.05)
    patients = synthetic_patients(network.eval(), shape)
    found = largest_contribution(lambda members: clipped_sum(network, loss, 0.05, members), patients) / 0.05
    assert 0.99 < found <= 1 + 1e-5, "the outlier must reach the bound, and stay below it"


@pytest.mark.parametrize("case", ["unet-2d", "unet-3d", "resnet-2d"])
def test_the_sum_equals_brute_force(case: str) -> None:
    network, loss, shape = make(case)
    patients = synthetic_patients(network, shape)
    norms = [float(patient_gradient(network, loss, p).norm()) for p in patients]
    clip = sorted(norms)[1]  # one patient below the bound, one on it, one above
    expected = sum(
        (g * min(1.0, clip / float(g.norm())) for g in (patient_gradient(network, loss, p) for p in patients)),
        torch.zeros(1, dtype=torch.float64),
    )
    found = clipped_sum(network, loss, clip, patients).double()
    assert float((found - expected).norm() / expected.norm()) < 1e-5


def test_k_crops_are_averaged_before_the_clip() -> None:
    """A patient of four crops contributes C, not 4 C, and the direction is that of the mean."""
    network, loss, _ = make("unet-2d")
    images, labels = torch.randn(4, 1, 16, 16), torch.ones(4, 16, 16, dtype=torch.int64)
    found = clipped_sum(network, loss, 0.05, [(images, labels)]).double()
    direction = sum(
        (patient_gradient(network, loss, (images[i : i + 1], labels[i : i + 1])) for i in range(4)), torch.zeros(1)
    )
    assert float(found.norm()) == pytest.approx(0.05, rel=1e-5)
    assert float(torch.dot(found, direction) / found.norm() / direction.norm()) == pytest.approx(1, abs=1e-6)


# What must be noticed. Each engine below is a mistake that has been made in the field.


def per_crop_sum(network: nn.Module, loss: Loss, clip: float, patients: Sequence[Patient]) -> Tensor:
    """Clips every crop on its own, as K-crop loaders in front of a per-sample engine do."""
    crops = [(i[k : k + 1], y[k : k + 1]) for i, y in patients for k in range(len(i))]
    return clipped_sum(network, loss, clip, crops)


def shared_batch_sum(network: nn.Module, loss: Loss, clip: float, patients: Sequence[Patient]) -> Tensor:
    """Clips per patient, but all patients go through the network in one batch, as hooks do."""
    logits = network(torch.cat([i for i, _ in patients])).split([len(i) for i, _ in patients])
    total = torch.zeros(sum(p.numel() for p in network.parameters()))
    for found, (_, labels) in zip(logits, patients, strict=True):
        gradients = torch.autograd.grad(loss(found, labels), list(network.parameters()), retain_graph=True)
        flat = torch.cat([g.reshape(-1) for g in gradients])
        total += flat * min(1.0, clip / float(flat.norm()))
    return total


def batch_dice_sum(network: nn.Module, clip: float, patients: Sequence[Patient]) -> Tensor:
    """Clips the gradient of each patient's part of a Dice loss over the whole batch."""
    from monai.losses.dice import DiceLoss

    dice = DiceLoss(include_background=False, to_onehot_y=True, softmax=True, batch=True)
    total = torch.zeros(sum(p.numel() for p in network.parameters()))
    logits = [network(i) for i, _ in patients]
    labels = torch.cat([y for _, y in patients])[:, None]
    for mine in range(len(patients)):
        parts = torch.cat([x if k == mine else x.detach() for k, x in enumerate(logits)])
        gradients = torch.autograd.grad(dice(parts, labels), list(network.parameters()), retain_graph=True)
        flat = torch.cat([g.reshape(-1) for g in gradients])
        total += flat * min(1.0, clip / float(flat.norm()))
    return total


def crowd(n: int, k: int = 2) -> list[Patient]:
    """``n`` ordinary patients with a bright square that is labelled, and an outlier without one."""
    generator = torch.Generator().manual_seed(2)
    patients = []
    for i in range(n):
        images, labels = torch.randn((k, 1, 16, 16), generator=generator), torch.zeros(k, 16, 16, dtype=torch.int64)
        labels[:, 2 : 6 + i % 4, 3:9] = 1
        patients.append((images + 2 * labels[:, None], labels))
    return [*patients, (300 * patients[0][0].flip(2) - 200, torch.ones_like(patients[0][1]))]


def undecided(network: nn.Module) -> nn.Module:
    """Takes the prior away, so that Dice has a gradient to speak of."""
    nn.init.zeros_(list(network.parameters())[-1])  # the last bias
    return network


def with_batch_norm(network: nn.Module) -> nn.Module:
    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.InstanceNorm2d):
                setattr(module, name, nn.BatchNorm2d(child.num_features))
    return network


def test_clipping_per_crop_is_noticed() -> None:
    network, loss, _ = make("unet-2d")
    patients = crowd(2, k=4)
    found = largest_contribution(lambda p: per_crop_sum(network, loss, 0.05, p), patients) / 0.05
    assert found > 2, "a patient of four crops contributes up to 4 C"


def test_batch_norm_is_noticed() -> None:
    """The shared batch is fine with InstanceNorm and far off with BatchNorm: the test sees the difference."""
    network, loss, _ = make("unet-2d")
    patients = crowd(8)

    def contribution() -> float:
        return largest_contribution(lambda p: shared_batch_sum(network, loss, 0.05, p), patients) / 0.05

    assert contribution() <= 1 + 1e-4
    with_batch_norm(network)
    assert contribution() > 1.2


def test_batch_dice_is_noticed() -> None:
    network, _, _ = make("unet-2d")
    patients = crowd(6)
    clip = 1e-4
    apart = largest_contribution(lambda p: clipped_sum(network, build_loss("dice", TaskSection()), clip, p), patients)
    coupled = largest_contribution(lambda p: batch_dice_sum(undecided(network), clip, p), patients)
    assert apart <= clip * (1 + 1e-5)
    assert coupled > clip * 1.01


def test_the_self_test_refuses_batch_norm_and_batch_dice() -> None:
    from monai.losses.dice import DiceLoss

    network, loss, shape = make("unet-2d")
    coupled = DiceLoss(include_background=False, to_onehot_y=True, softmax=True, batch=True)
    with pytest.raises(Refused, match="couples patients"):
        self_test(network, lambda logits, labels: coupled(logits, labels[:, None]), shape, clip=1.0)
    weighted = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 20.0]))
    with pytest.raises(Refused, match="couples patients"):
        self_test(network, lambda logits, labels: weighted(logits, labels), shape, clip=1.0)
    with pytest.raises(BadInput, match=r"layer model.* is BatchNorm2d.*use InstanceNorm or GroupNorm"):
        self_test(with_batch_norm(network), loss, shape, clip=1.0)


def test_running_statistics_are_refused() -> None:
    network = nn.Sequential(nn.Conv2d(1, 2, 1), nn.InstanceNorm2d(2, track_running_stats=True))
    with pytest.raises(BadInput, match=r"layer 1 is InstanceNorm2d: it keeps running statistics"):
        check_network(network)
    check_network(nn.Sequential(nn.Conv2d(1, 2, 1), nn.InstanceNorm2d(2)))


class Counting(nn.Module):
    """Remembers the mean of what it saw."""

    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(1, 2, 1)
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, images: Tensor) -> Tensor:
        self.seen += images.mean().detach()
        out: Tensor = self.convolution(images)
        return out


class Centring(nn.Module):
    """Subtracts the mean of the batch: couples patients without any normalisation layer."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(1, 2, 1)

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.convolution(images - images.mean())
        return out


def test_home_made_layers_that_leak_are_refused() -> None:
    loss = build_loss("cross_entropy", TaskSection())
    with pytest.raises(Refused, match="changes buffer seen"):
        self_test(Counting(), loss, (2, 1, 8, 8), clip=1.0)
    with pytest.raises(Refused, match="depends on the other images"):
        self_test(Centring(), loss, (2, 1, 8, 8), clip=1.0)


class Doubled(PatientGradient):
    """An engine with a fault of the kind that hooks on a module registered twice have: gradients count double."""

    def accumulate(self, images: Tensor, labels: Tensor) -> None:
        super().accumulate(images, labels)
        super().accumulate(images, labels)


def test_the_self_test_refuses_a_faulty_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    from fedneuro.privacy.dpsgd import proof

    network, loss, shape = make("unet-2d")
    monkeypatch.setattr(proof, "PatientGradient", Doubled)
    with pytest.raises(Refused, match=r"SegmentationUNet: one patient moves the clipped sum by 2\.0"):
        self_test(network, loss, shape, clip=0.05)


def test_the_self_test_leaves_the_network_as_it_was() -> None:
    network, loss, shape = make("unet-2d-dropout")
    network.eval()
    modes = [m.training for m in network.modules()]
    before = [p.clone() for p in network.parameters()]
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    self_test(network, loss, shape, clip=1.0)
    assert torch.equal(torch.rand(2), expected), "the caller's random state must not move"
    assert [m.training for m in network.modules()] == modes
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), before, strict=True))
    assert all(p.grad is None for p in network.parameters())


# Noise, and the steps that have none or few patients.


def noised(engine: PatientGradient, network: nn.Module) -> Tensor:
    engine.finish()
    return torch.cat([p.grad.reshape(-1) for p in network.parameters() if p.grad is not None]).double()


def test_noise_has_the_promised_deviation_and_no_other() -> None:
    """σC / expected patients, on an empty batch; 0.9 and 1.1 times it must be rejected."""
    network = nn.Linear(400, 250)
    engine = engine_for(network, nn.functional.cross_entropy, clip=0.5, noise_multiplier=3.0, expected_patients=8.0)
    draws = noised(engine, network) / (3.0 * 0.5 / 8.0)
    assert draws.numel() == 400 * 250 + 250
    assert stats.kstest(draws.numpy(), "norm").pvalue > 1e-9
    for factor in (0.9, 1.1):
        assert stats.kstest(draws.numpy() * factor, "norm").pvalue < 1e-9


def test_the_mean_of_the_noised_gradient_is_the_clipped_sum() -> None:
    network, loss, shape = make("unet-2d")
    patients = synthetic_patients(network, shape)
    expected = clipped_sum(network, loss, 0.05, patients).double() / 4.0
    engine = engine_for(network, loss, noise_multiplier=1e-4)
    for images, labels in patients:
        engine.accumulate(images, labels)
    found = noised(engine, network)
    assert float((found - expected).norm()) < 3 * 1e-4 * 0.05 / 4 * math.sqrt(expected.numel())


def test_noise_lies_on_a_fixed_grid() -> None:
    """Multiples of a power of two that depends on σC alone, whatever the sum was."""
    network, loss, shape = make("unet-2d")
    engine = engine_for(network, loss, clip=1.0, noise_multiplier=1.0, expected_patients=1.0)
    for images, labels in synthetic_patients(network, shape):
        engine.accumulate(images, labels)
    found = noised(engine, network) * 2.0**20
    assert torch.equal(found, found.round())


def test_two_runs_with_the_same_seeds_give_different_noise() -> None:
    network = nn.Linear(10, 10)
    torch.manual_seed(0)
    first = noised(engine_for(network, nn.functional.cross_entropy), network)
    torch.manual_seed(0)
    second = noised(engine_for(network, nn.functional.cross_entropy), network)
    assert not bool((first == second).any())


def test_an_empty_batch_is_a_step_of_noise() -> None:
    network, loss, shape = make("unet-2d")
    engine = engine_for(network, loss)
    for images, labels in synthetic_patients(network, shape):
        engine.accumulate(images, labels)
    engine.finish()
    report = engine.finish()  # nobody was chosen
    assert (report.patients, report.clipped, report.non_finite, report.loss) == (0, 0, 0, None)
    draws = torch.cat([p.grad.reshape(-1) for p in network.parameters() if p.grad is not None]) / (0.05 / 4)
    assert abs(float(draws.square().mean()) - 1) < 6 * math.sqrt(2 / draws.numel()), "no rest of the step before"
    assert all(p.grad is not None for p in network.parameters())


def test_a_patient_who_is_not_finite_counts_as_zero() -> None:
    network, loss, shape = make("unet-2d")
    patients = synthetic_patients(network, shape)
    expected = clipped_sum(network, loss, 0.05, patients)
    engine = engine_for(network, loss)
    for poison in (math.nan, math.inf):
        engine.accumulate(torch.full_like(patients[0][0], poison), patients[0][1])
    for images, labels in patients:
        engine.accumulate(images, labels)
    assert torch.equal(engine.take_sum(), expected)
    report = engine.report()
    assert (report.patients, report.non_finite) == (5, 2)
    assert report.clipped == sum(float(patient_gradient(network, loss, p).norm()) > 0.05 for p in patients)
    assert report.loss == pytest.approx(sum(float(loss(network(i), y).detach()) for i, y in patients) / 3, rel=1e-5)


def test_the_bare_sum_is_out_of_the_optimisers_reach() -> None:
    network, loss, shape = make("unet-2d")
    engine = engine_for(network, loss)
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
    images, labels = synthetic_patients(network, shape)[0]
    engine.finish()
    engine.accumulate(images, labels)
    before = [p.clone() for p in network.parameters()]
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), before, strict=True))
    engine.finish()
    optimizer.step()
    assert not any(torch.equal(a, b) for a, b in zip(network.parameters(), before, strict=True))


def test_frozen_and_unused_parameters() -> None:
    """A frozen parameter gets neither gradient nor noise; a trainable one that the loss does not reach gets noise."""
    used, unused, frozen = nn.Linear(3, 2), nn.Linear(3, 2), nn.Linear(3, 3).requires_grad_(False)
    network = nn.Sequential(frozen, used)
    used.register_module("spare", unused)
    engine = engine_for(network, nn.functional.cross_entropy)
    engine.accumulate(torch.randn(2, 3), torch.tensor([0, 1]))
    engine.finish()
    assert frozen.weight.grad is None
    assert unused.weight.grad is not None
    assert bool(unused.weight.grad.any())


def test_bfloat16_keeps_the_bound() -> None:
    network, loss, shape = make("unet-2d")
    patients = synthetic_patients(network, shape)

    def summed(members: Sequence[Patient]) -> Tensor:
        engine = engine_for(network, loss, autocast=torch.bfloat16)
        for images, labels in members:
            engine.accumulate(images, labels)
        total = engine.take_sum()
        assert total.dtype == torch.float32
        return total

    assert 0.99 < largest_contribution(summed, patients) / 0.05 <= 1 + 1e-5
    exact = clipped_sum(network, loss, 0.05, patients[:1])
    assert 1e-6 < float((summed(patients[:1]) - exact).norm() / exact.norm()) < 0.2


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("clip", 0.0),
        ("clip", math.inf),
        ("noise_multiplier", 0.0),
        ("noise_multiplier", math.nan),
        ("expected_patients", -1.0),
    ],
)
def test_senseless_numbers_are_refused(name: str, value: float) -> None:
    with pytest.raises(BadInput, match=f"{name} = "):
        engine_for(nn.Linear(2, 2), nn.functional.cross_entropy, **{name: value})


def test_a_network_without_trainable_parameters_is_refused() -> None:
    with pytest.raises(BadInput, match="no trainable parameter"):
        engine_for(nn.Linear(2, 2).requires_grad_(False), nn.functional.cross_entropy)


def test_the_apartness_check_accepts_what_is_apart() -> None:
    network, loss, shape = make("resnet-2d")
    _check_apart(network, loss, synthetic_patients(network, shape), "ResNet")

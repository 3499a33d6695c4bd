# SPDX-License-Identifier: Apache-2.0
"""Every way to patients' gradients gives the same sum and keeps the same bound; the choice among them is sound.

``FEDNEURO_EVERY_PATH=1`` runs every network with every loss, path and arithmetic (minutes); the usual run takes
every network, every loss, every path and every arithmetic at least once.
"""

import os
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedneuro.models.losses import LOSSES, build_loss
from fedneuro.models.networks import build_network
from fedneuro.models.spec import ModelSection, TaskSection
from fedneuro.privacy.dpsgd import (
    Loop,
    Loss,
    Path,
    PatientGradient,
    Vmap,
    choose_path,
    largest_contribution,
    self_test,
    synthetic_patients,
)
from fedneuro.privacy.dpsgd import trial as trial_module
from fedneuro.privacy.dpsgd.gradient import Clipping
from fedneuro.privacy.dpsgd.hooks import OpacusHooks
from fedneuro.privacy.errors import BadInput, Refused
from fedneuro.privacy.noise import SecureRandom

Patient = tuple[Tensor, Tensor]
CLIP = 0.05

NETWORKS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "unet-2d": ({"name": "unet", "dims": 2, "channels": (4, 8)}, (2, 1, 16, 16)),
    "unet-2d-group": ({"name": "unet", "dims": 2, "channels": (4, 8), "norm": "group"}, (2, 1, 16, 16)),
    "unet-3d": ({"name": "unet", "dims": 3, "channels": (4, 8)}, (2, 1, 8, 8, 8)),
    "resnet-2d": ({"name": "resnet", "dims": 2, "channels": (4, 4, 8, 8), "norm": "group"}, (2, 1, 32, 32)),
    "resnet-3d": ({"name": "resnet", "dims": 3, "channels": (4, 4, 8, 8), "norm": "group"}, (2, 1, 32, 32, 32)),
}
PATHS = ("loop", "loop, one crop at a time", "loop, channels last", "vmap 1", "vmap 2", "opacus")
ALL = [
    (network, loss, path, dtype)
    for network in NETWORKS
    for loss in LOSSES
    for path in PATHS
    for dtype in ("float32", "bfloat16")
    if (network.startswith("unet") or not loss.startswith("dice"))  # a class has no Dice
    and not (path == "opacus" and (dtype == "bfloat16" or network.startswith("resnet")))  # refused, see below
]
USUAL = [
    ("unet-2d", "dice_ce", "vmap 2", "float32"),
    ("unet-2d", "focal", "vmap 2", "bfloat16"),
    ("unet-2d", "dice", "vmap 1", "float32"),
    ("unet-2d-group", "dice", "vmap 2", "float32"),
    ("unet-2d-group", "cross_entropy", "loop, channels last", "bfloat16"),
    ("unet-2d", "dice_ce", "loop", "bfloat16"),
    ("unet-3d", "cross_entropy", "vmap 2", "bfloat16"),
    ("unet-3d", "dice_ce", "loop, one crop at a time", "float32"),
    ("unet-2d", "dice_ce", "opacus", "float32"),
    ("unet-2d-group", "cross_entropy", "opacus", "float32"),
    ("resnet-2d", "focal", "vmap 2", "float32"),
    ("resnet-3d", "cross_entropy", "loop", "bfloat16"),
]
CASES = ALL if os.environ.get("FEDNEURO_EVERY_PATH") else USUAL


def make(case: str, loss: str = "cross_entropy") -> tuple[nn.Module, Loss, tuple[int, ...]]:
    values, shape = NETWORKS[case]
    task = TaskSection()
    if case.startswith("resnet"):
        task = TaskSection(kind="classification", labels=("a", "b"), target="t")
    return build_network(ModelSection(**values), in_channels=1, out_channels=2, seed=0), build_loss(loss, task), shape


def path_of(name: str, network: nn.Module, loss: Loss, dtype: str = "float32") -> Path:
    autocast = torch.bfloat16 if dtype == "bfloat16" else None
    if name.startswith("loop"):
        batch = 1 if "one crop" in name else 0
        return Loop(network, loss, autocast=autocast, physical_batch=batch, channels_last="last" in name)
    if name.startswith("vmap"):
        return Vmap(network, loss, patients=int(name[-1]), autocast=autocast)
    return OpacusHooks(network, loss, patients=2)


def clipped_sum(
    network: nn.Module, loss: Loss, path: Path, patients: Sequence[Patient], clipping: Clipping = "clip"
) -> Tensor:
    engine = PatientGradient(
        network,
        loss,
        clip=CLIP,
        noise_multiplier=1.0,
        expected_patients=1.0,
        random=SecureRandom(),
        path=path,
        clipping=clipping,
    )
    for images, labels in patients:
        engine.accumulate(images, labels)
    return engine.take_sum()


@pytest.mark.parametrize(("case", "loss_name", "path_name", "dtype"), CASES)
def test_every_path_keeps_the_bound_and_agrees(case: str, loss_name: str, path_name: str, dtype: str) -> None:
    """Leave one out through the path, an outlier among an odd number of patients; and the loop's own sum."""
    network, loss, shape = make(case, loss_name)
    patients = synthetic_patients(network, shape, count=3)
    path = path_of(path_name, network, loss, dtype)
    found = largest_contribution(lambda members: clipped_sum(network, loss, path, members), patients) / CLIP
    assert 0.99 < found <= 1 + 1e-5
    exact = clipped_sum(network, loss, Loop(network, loss), patients)
    apart = float((clipped_sum(network, loss, path, patients) - exact).norm() / exact.norm())
    assert apart < (1e-4 if dtype == "float32" else 0.3)


@pytest.mark.parametrize("clipping", ["clip", "normalise"])
def test_clipping_by_hand(clipping: Clipping) -> None:
    """One weight, loss w·mean(x): the gradient is mean(x). 4 is clipped to 0.05; 0.01 stays, or becomes C·0.01/0.02."""
    network = nn.Linear(1, 1, bias=False)

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        del labels
        return logits.mean()

    for gradient, expected in (
        (4.0, {"clip": CLIP, "normalise": CLIP * 4 / 4.01}),
        (0.01, {"clip": 0.01, "normalise": CLIP * 0.01 / 0.02}),
        (0.0, {"clip": 0.0, "normalise": 0.0}),
    ):
        patient = (torch.full((2, 1), gradient), torch.zeros(2))
        found = clipped_sum(network, loss, Loop(network, loss), [patient], clipping)
        assert found.item() == pytest.approx(expected[clipping], rel=1e-5)


def test_normalised_gradients_keep_the_bound() -> None:
    network, loss, shape = make("unet-2d", "dice_ce")
    self_test(network, loss, shape, CLIP, clipping="normalise")
    patients = synthetic_patients(network, shape)
    contribution = largest_contribution(
        lambda p: clipped_sum(network, loss, Loop(network, loss), p, "normalise"), patients
    )
    assert 0.9 * CLIP < contribution < CLIP


class Bfloat16Norms(Loop):
    """The mistake of privacy.md §1 (11): the gradient's length is seen through bfloat16."""

    def gradients(self, images: Tensor, labels: Tensor) -> tuple[list[Tensor | None], Tensor]:
        found, losses = super().gradients(images, labels)
        grads = [g for g in found if g is not None]
        exact = torch.linalg.vector_norm(torch.cat([g.flatten() for g in grads]))
        coarse = torch.linalg.vector_norm(torch.cat([g.flatten() for g in grads]).bfloat16())
        # What an engine with such a norm divides by; the engine above then clips nothing more.
        return [g * (0.999999 * CLIP / float(coarse)) if float(exact) > CLIP else g for g in grads], losses


def test_norms_in_bfloat16_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    from fedneuro.privacy.dpsgd import gradient

    network, loss, shape = make("unet-2d")
    monkeypatch.setattr(gradient.PatientGradient, "_factor", lambda *_: 1.0)
    found = []
    for seed in range(6):  # the error has either sign
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        patients = synthetic_patients(network, shape)
        summed = partial(clipped_sum, network, loss, Bfloat16Norms(network, loss))
        found.append(largest_contribution(summed, patients) / CLIP)
    assert max(found) > 1 + 1e-4


def test_a_patient_who_is_not_finite_does_not_touch_the_others_of_the_group() -> None:
    network, loss, shape = make("unet-2d")
    path = Vmap(network, loss, patients=2)
    patients = synthetic_patients(network, shape)
    sick = (torch.full(shape, torch.nan), patients[0][1])
    expected = clipped_sum(network, loss, path, patients)
    assert torch.equal(clipped_sum(network, loss, path, [patients[0], sick, *patients[1:]]).isfinite(), expected > -9)
    with_sick = clipped_sum(network, loss, path, [patients[0], sick, *patients[1:]])
    torch.testing.assert_close(with_sick, expected, rtol=1e-5, atol=1e-8)


def test_frozen_parameters_are_read_anew_and_get_no_gradient() -> None:
    """A record holds no weights: after a new global model, frozen and trained ones are the new ones."""
    network, loss, shape = make("unet-2d")
    names = list(dict(network.named_parameters()))
    for parameter in list(network.parameters())[:-2]:
        parameter.requires_grad_(False)
    path = Vmap(network, loss, patients=1)
    patients = synthetic_patients(network, shape)[:1]
    before = clipped_sum(network, loss, path, patients)
    assert before.numel() == sum(p.numel() for p in list(network.parameters())[-2:]) < len(names) * 100
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(1.5)
    found = clipped_sum(network, loss, path, patients)
    torch.testing.assert_close(found, clipped_sum(network, loss, Loop(network, loss), patients), rtol=1e-4, atol=1e-7)
    assert not torch.equal(found, before)


class PerCrop(Loop):
    """The mistake of K-crop loaders: every crop is a patient."""

    patients = 1

    def gradients(self, images: Tensor, labels: Tensor) -> tuple[list[Tensor | None], Tensor]:
        rows = [super(PerCrop, self).gradients(images[:, i : i + 1], labels[:, i : i + 1]) for i in range(4)]
        total = [torch.zeros_like(g) for g in rows[0][0] if g is not None]
        for grads, _ in rows:
            crop = [g for g in grads if g is not None]
            norm = torch.linalg.vector_norm(torch.cat([g.flatten() for g in crop]))
            total = [t + g * (CLIP / max(CLIP, float(norm))) for t, g in zip(total, crop, strict=True)]
        return list(total), rows[0][1]


def test_the_self_test_tries_the_path_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    from fedneuro.privacy.dpsgd import gradient

    network, loss, _ = make("unet-2d")
    monkeypatch.setattr(gradient.PatientGradient, "_factor", lambda *_: 1.0)  # its path has clipped, it believes
    with pytest.raises(Refused, match=r"one patient moves the clipped sum by [234]\."):
        self_test(network, loss, (4, 1, 16, 16), CLIP, path=PerCrop(network, loss))


# Opacus' hooks: where they hold, and where they are refused.


def test_opacus_is_refused_where_its_gradients_are_wrong() -> None:
    network, loss, shape = make("resnet-2d")
    path = OpacusHooks(network, loss)
    with pytest.raises(BadInput, match=r"Opacus' hooks cannot be used .*; use privacy.engine = .auto"):
        self_test(network, loss, shape, CLIP, path=path)
    shared = nn.Conv2d(1, 1, 1)
    with pytest.raises(BadInput, match="layer b is in the network twice"):
        OpacusHooks(nn.ModuleDict({"a": shared, "b": shared}), loss)
    with pytest.raises(BadInput, match="computes in float32"):
        choose_path(network, loss, shape, engine="opacus", autocast=torch.bfloat16)


def test_opacus_leaves_the_network_as_it_was() -> None:
    network, loss, shape = make("unet-2d")
    names = [*network.state_dict()]
    path = OpacusHooks(network, loss)
    network.eval()
    clipped_sum(network, loss, path, synthetic_patients(network, shape))
    assert not network.training
    assert [*network.state_dict()] == names
    assert all(p.grad is None for p in network.parameters())
    assert not any(hasattr(p, "grad_sample") for p in network.parameters())
    assert not any(m._forward_hooks or m._backward_hooks for m in network.modules())


# The choice.


def test_the_choice_is_the_fastest_that_works(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds per group are given here; a step of 6 patients: 6 x 1 s, 3.25 groups of 2 at 1.5 s, 1.875 of 4 at 3 s."""
    network, loss, shape = make("unet-2d")
    seconds = {"loop": 1.0, "vmap, 1 at once": 1.2, "vmap, 2 at once": 1.5, "vmap, 4 at once": 3.0}
    monkeypatch.setattr(trial_module, "_prepare", lambda _network, _shape, path: (lambda: seconds[path.name], 1))
    choice = choose_path(network, loss, shape, expected_patients=6.0)
    assert choice.path.name == "vmap, 2 at once"
    expected = {"loop": 6, "vmap, 1 at once": 7.2, "vmap, 2 at once": 4.875, "vmap, 4 at once": 5.625}
    assert choice.seconds == pytest.approx(expected)
    assert choice.reason.startswith("vmap, 2 at once (a step: loop 6 s, ")
    assert choose_path(network, loss, shape, physical_batch=2).path.patients == 1
    assert choose_path(network, loss, shape, most_patients=1).path.name == "loop"
    assert choose_path(network, loss, shape, engine="loop").path.name == "loop"
    quick = choose_path(network, loss, shape, steps=2, expected_patients=6.0)
    assert quick.path.name == "loop" and "not worth a trial" in quick.reason
    monkeypatch.setattr(trial_module, "_prepare", lambda _network, _shape, path: (lambda: seconds[path.name], 10))
    monkeypatch.setattr(trial_module, "_free_memory", lambda _: 30)
    tight = choose_path(network, loss, shape)
    assert tight.path.patients == 1 and "vmap, 2 at once left out: not enough memory" in tight.reason


def test_a_path_that_fails_is_left_out_and_named() -> None:
    class Branching(nn.Module):
        """Looks at a value: plain autograd can, a record of a few patients cannot."""

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, images: Tensor) -> Tensor:
            out: Tensor = self.layer(images if float(images.sum()) > 0 else -images)
            return out

    network, loss = Branching(), nn.functional.cross_entropy
    choice = choose_path(network, loss, (2, 3))
    assert choice.path.name == "loop"
    assert "vmap, 2 at once left out: " in choice.reason
    with pytest.raises(BadInput, match="vmap, 1 at once does not work for this network"):
        choose_path(network, loss, (2, 3), engine="vmap")
    with pytest.raises(BadInput, match="physical_batch = 1 forbids it"):
        choose_path(network, loss, (2, 3), engine="vmap", physical_batch=1)


def test_the_trial_moves_neither_weights_nor_random_numbers() -> None:
    network, loss, shape = make("unet-2d")
    before = [p.clone() for p in network.parameters()]
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    choose_path(network, loss, shape, steps=1)
    assert torch.equal(torch.rand(2), expected)
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), before, strict=True))
    assert all(p.grad is None for p in network.parameters())

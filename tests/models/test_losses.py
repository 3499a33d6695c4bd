# SPDX-License-Identifier: Apache-2.0
"""Losses: each is a mean over images, and equals what its definition says."""

import math

import pytest
import torch
from torch import Tensor

from fedneuro.models.losses import LOSSES, SMOOTH, build_loss
from fedneuro.models.spec import SUITED_LOSSES, TaskSection

SEGMENTATION = TaskSection(labels=("oedema", "core"))
CLASSIFICATION = TaskSection(kind="classification", labels=("a", "b", "c"), target="kind")
REGRESSION = TaskSection(kind="regression", target="age")
SURVIVAL = TaskSection(kind="survival", target="months", event="died", time_cuts=(6.0, 12.0, 24.0))
TASKS = (SEGMENTATION, CLASSIFICATION, REGRESSION, SURVIVAL)
CASES = [(name, task) for task in TASKS for name in SUITED_LOSSES[task.kind]]


def batch(task: TaskSection) -> tuple[Tensor, Tensor]:
    """Five unlike images: one without foreground, one all foreground, one with huge logits."""
    generator = torch.Generator().manual_seed(0)
    spatial = (6, 7, 4) if task.kind == "segmentation" else ()
    logits = torch.randn((5, 3, *spatial), generator=generator)
    logits[4] *= 30
    labels = torch.randint(3, (5, *spatial), generator=generator)
    labels[0], labels[1] = 0, 2
    return logits, labels


@pytest.mark.parametrize(("name", "task"), CASES)
def test_the_loss_of_a_batch_is_the_mean_over_its_images(name: str, task: TaskSection) -> None:
    loss = build_loss(name, task)
    logits, labels = batch(task)
    alone = torch.stack([loss(logits[i : i + 1], labels[i : i + 1]) for i in range(5)])
    assert loss(logits, labels).ndim == 0
    torch.testing.assert_close(loss(logits, labels), alone.mean())


@pytest.mark.parametrize(("name", "task"), CASES)
def test_the_gradient_of_an_image_ignores_the_others(name: str, task: TaskSection) -> None:
    loss = build_loss(name, task)
    logits, labels = batch(task)

    def gradient(others: Tensor) -> Tensor:
        first = logits[:1].clone().requires_grad_()
        (found,) = torch.autograd.grad(loss(torch.cat([first, others]), labels), first)
        return found

    torch.testing.assert_close(gradient(logits[1:]), gradient(100 * logits[1:] - 3))


def test_dice_by_hand() -> None:
    """One image of four voxels, certain logits: the label is 1 in two voxels, the prediction in one of them.

    Smoothed by one voxel: Dice = (2·1 + 1) / (1 + 2 + 1) = 3/4, so the loss is 1/4.
    """
    labels = torch.tensor([[[1, 1], [0, 0]]])
    logits = torch.full((1, 2, 2, 2), -50.0)
    logits[0, 0] = torch.tensor([[-50.0, 50.0], [50.0, 50.0]])
    logits[0, 1, 0, 0] = 50.0
    assert build_loss("dice", TaskSection())(logits, labels).item() == pytest.approx(1 / 4, abs=1e-4)


def test_an_image_without_foreground_teaches() -> None:
    """With MONAI's own smoothing of 1e-5 this gradient is about 1e-6 of the one here."""
    logits = torch.zeros(1, 2, 8, 8, requires_grad=True)
    build_loss("dice", TaskSection())(logits, torch.zeros(1, 8, 8, dtype=torch.int64)).backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None and float(logits.grad.norm()) > 1e-3


def test_cross_entropy_and_focal_by_hand() -> None:
    """Probability 3/4 of the truth: CE = ln(4/3); focal, γ = 2, mean over both classes: (1/4)²·ln(4/3) / 2."""
    logits = torch.tensor([[0.0, math.log(3.0)]])
    labels = torch.tensor([1])
    expected = math.log(4 / 3)
    assert build_loss("cross_entropy", CLASSIFICATION)(logits, labels).item() == pytest.approx(expected, rel=1e-5)
    assert build_loss("focal", CLASSIFICATION)(logits, labels).item() == pytest.approx(expected / 32, rel=1e-5)


def test_dice_ce_is_the_sum_and_equals_monai() -> None:
    from monai.losses.dice import DiceCELoss

    logits, labels = batch(SEGMENTATION)
    parts = [build_loss(n, SEGMENTATION)(logits, labels) for n in ("dice", "cross_entropy", "dice_ce")]
    torch.testing.assert_close(parts[0] + parts[1], parts[2])
    oracle = DiceCELoss(include_background=False, to_onehot_y=True, softmax=True, smooth_nr=1, smooth_dr=1)
    torch.testing.assert_close(parts[2], oracle(logits, labels[:, None]))


def test_losses_of_a_number_equal_their_formulas() -> None:
    """Errors 0.5 and -3: squares 0.25 and 9; Huber 0.5²/2 = 0.125 and 3 - 1/2 = 2.5."""
    outputs, targets = torch.tensor([[1.5], [-1.0]]), torch.tensor([1.0, 2.0])
    found = [build_loss(name, REGRESSION)(outputs, targets).item() for name in ("mse", "l1", "huber")]
    assert found == pytest.approx([(0.25 + 9) / 2, (0.5 + 3) / 2, (0.125 + 2.5) / 2])


def test_the_hazard_loss_is_the_likelihood_of_each_patient() -> None:
    """Hazards 1/4, 1/2, 3/4 (odds 1/3, 1, 3) in three intervals; five patients.

    Event in the 1st: 1/4. Event in the 3rd: 3/4 · 1/2 · 3/4. Seen for one interval, for none, for all three: 3/4, 1,
    and 3/4 · 1/2 · 1/4.
    """
    logits = torch.tensor([[1 / 3, 1.0, 3.0]]).log()
    likelihoods = {1: 1 / 4, 5: 9 / 32, 2: 3 / 4, 0: 1.0, 6: 3 / 32}
    for code, likelihood in likelihoods.items():
        found = build_loss("hazard", SURVIVAL)(logits, torch.tensor([code]))
        assert found.neg().exp().item() == pytest.approx(likelihood)


def test_every_loss_suits_a_task_and_no_other_is_named() -> None:
    assert {name for names in SUITED_LOSSES.values() for name in names} == set(LOSSES)


def test_unsuited_losses_are_refused() -> None:
    for name, task in (("mse", SURVIVAL), ("hazard", REGRESSION), ("l1", SEGMENTATION)):
        with pytest.raises(ValueError, match=f"not for {task.kind}"):
            build_loss(name, task)
    with pytest.raises(ValueError, match="not for classification"):
        build_loss("dice", CLASSIFICATION)
    with pytest.raises(ValueError, match="choose one of dice_ce, dice"):
        build_loss("tversky", SEGMENTATION)


@pytest.mark.parametrize("task", [SEGMENTATION, CLASSIFICATION])
def test_focal_and_dice_and_their_gradients_equal_monai(task: TaskSection) -> None:
    from monai.losses.dice import DiceLoss
    from monai.losses.focal_loss import FocalLoss

    oracles: dict[str, torch.nn.Module] = {
        "focal": FocalLoss(include_background=True, to_onehot_y=True, use_softmax=True, gamma=2.0)
    }
    if task is SEGMENTATION:
        oracles["dice"] = DiceLoss(
            include_background=False, to_onehot_y=True, softmax=True, smooth_nr=SMOOTH, smooth_dr=SMOOTH
        )
    for name, oracle in oracles.items():
        logits, labels = batch(task)
        logits.requires_grad_()
        ours, theirs = build_loss(name, task)(logits, labels), oracle(logits, labels[:, None])
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(torch.autograd.grad(ours, logits), torch.autograd.grad(theirs, logits))


@pytest.mark.parametrize(("name", "task"), CASES)
def test_every_loss_works_under_vmap(name: str, task: TaskSection) -> None:
    loss = build_loss(name, task)
    logits, labels = batch(task)
    together = torch.vmap(loss)(logits[:, None], labels[:, None])
    torch.testing.assert_close(together.mean(), loss(logits, labels))

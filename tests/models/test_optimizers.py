# SPDX-License-Identifier: Apache-2.0
"""Optimisers: NoisedAdam is Adam without noise, takes the noise's share out of the second moment, and can be saved."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from fedneuro.models.optimizers import NoisedAdam, build_optimizer, optimizer_arrays, restore_optimizer


def weight(*values: float) -> nn.Parameter:
    return nn.Parameter(torch.tensor(values))


@pytest.mark.parametrize(("name", "decay"), [("adam", 0.0), ("adam", 0.1), ("adamw", 0.1)])
def test_without_noise_it_is_adam(name: str, decay: float) -> None:
    ours, theirs = weight(1.0, -2.0, 0.5), weight(1.0, -2.0, 0.5)
    optimizers = [
        build_optimizer(name, [ours], 0.01, weight_decay=decay, noised=True),
        build_optimizer(name, [theirs], 0.01, weight_decay=decay),
    ]
    assert isinstance(optimizers[0], NoisedAdam)
    for step in range(5):
        for parameter, optimizer in zip((ours, theirs), optimizers, strict=True):
            parameter.grad = torch.tensor([1.0, -0.3, 0.01 * step])
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_the_correction_by_hand() -> None:
    """First step, s = 1: v = g². With g = 3: v - s² = 8, so the step is 3/√8. With g = 1.2: v - s² = 0.44 is below the
    floor s²·√2 (one square of a normal number has standard error √2), so the step is 1.2/√(√2).
    """
    parameter = weight(0.0, 0.0)
    optimizer = NoisedAdam([parameter], 1.0)
    optimizer.noise_std = 1.0
    parameter.grad = torch.tensor([3.0, 1.2])
    optimizer.step()
    expected = torch.tensor([-3 / math.sqrt(8), -1.2 / 2**0.25])
    torch.testing.assert_close(parameter.detach(), expected, rtol=1e-5, atol=0)


def test_it_finds_the_scale_of_the_signal_under_the_noise() -> None:
    """A gradient of mean 0.5 with noise of deviation 1: v - s² tends to 0.25, so steps tend to 1; Adam's to 0.45."""
    generator = torch.Generator().manual_seed(0)
    moved = {}
    for noise in (0.0, 1.0):
        parameter = nn.Parameter(torch.zeros(400))
        optimizer = NoisedAdam([parameter], 1.0)
        optimizer.noise_std = noise
        start = parameter.detach().clone()
        for step in range(2500):
            if step == 2000:
                start = parameter.detach().clone()
            parameter.grad = 0.5 + torch.randn(400, generator=generator)
            optimizer.step()
        moved[noise] = float((start - parameter.detach()).mean()) / 500
    assert moved[0.0] == pytest.approx(0.5 / math.sqrt(1.25), rel=0.05)
    assert moved[1.0] == pytest.approx(1.0, rel=0.1)


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
@pytest.mark.parametrize("noised", [False, True])
def test_a_saved_state_goes_on_with_the_same_bits(name: str, noised: bool) -> None:
    def build(parameter: nn.Parameter) -> torch.optim.Optimizer:
        return build_optimizer(name, [parameter], 0.1, momentum=0.9 if name == "sgd" else 0.0, noised=noised)

    whole, halted = weight(1.0, 2.0), weight(1.0, 2.0)
    first, second = build(whole), build(halted)
    for step in range(4):
        if step == 2:
            arrays = {key: np.array(value) for key, value in optimizer_arrays(second).items()}
            second = build(halted)
            restore_optimizer(second, arrays)
        for parameter, optimizer in ((whole, first), (halted, second)):
            parameter.grad = torch.tensor([0.5, -1.0]) * (step + 1)
            optimizer.step()
    assert torch.equal(whole, halted)


def test_a_parameter_without_gradient_stays() -> None:
    parameter = weight(1.0)
    NoisedAdam([parameter], 1.0, weight_decay=0.5, decoupled=True).step()
    assert parameter.item() == 1.0

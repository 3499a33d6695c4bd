# SPDX-License-Identifier: Apache-2.0
"""The fast layers of the U-Nets are PyTorch's, to rounding, alone and under vmap."""

from typing import Literal

import pytest
import torch
from torch.func import functional_call, grad, vmap

from fedneuro.models.networks import build_network
from fedneuro.models.networks.fast import FewChannels2d, InstanceNorm2d, InstanceNorm3d, PReLU
from fedneuro.models.spec import ModelSection

SHAPES = [(3,), (4, 2), (2, 3, 5, 7), (2, 3, 4, 5, 6)]


def pair() -> tuple[PReLU, torch.nn.PReLU]:
    """Ours and PyTorch's, with the same slope."""
    ours, theirs = PReLU(init=0.17), torch.nn.PReLU(init=0.17)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    return ours, theirs


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_gradients(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    x, g = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    x.view(-1)[0] = 0.0
    results = []
    for module in pair():
        inputs = x.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            out = module(inputs)
        slope = module.weight
        found = torch.autograd.grad(out, [inputs, slope], g.to(out.dtype))
        results.append((out, *found))
    ours, theirs = results
    assert ours[0].dtype == theirs[0].dtype and torch.equal(ours[0], theirs[0])
    assert torch.equal(ours[1], theirs[1])
    tolerance = 1e-6 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(ours[2], theirs[2], rtol=tolerance, atol=tolerance)


def test_backward_of_a_view_that_is_not_contiguous() -> None:
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    slopes = []
    for module in pair():
        inputs = x.clone().requires_grad_()
        (module(inputs.transpose(1, 3)) ** 2).sum().backward()
        slopes.append((inputs.grad, module.weight.grad))
    torch.testing.assert_close(slopes[0], slopes[1], rtol=1e-6, atol=1e-6)


def test_vmap_gives_each_patient_the_slope_of_that_patient() -> None:
    ours, _ = pair()
    x = torch.randn(5, 2, 3, 4, 4, generator=torch.Generator().manual_seed(3))

    def loss(parameters: dict[str, torch.Tensor], images: torch.Tensor) -> torch.Tensor:
        squares: torch.Tensor = functional_call(ours, parameters, (images,)) ** 2
        return squares.mean()

    parameters = {k: v.detach() for k, v in ours.named_parameters()}
    together = vmap(grad(loss), in_dims=(None, 0))(parameters, x)["weight"]
    alone = torch.stack([grad(loss)(parameters, patient)["weight"] for patient in x])
    assert together.shape == (5, 1)
    torch.testing.assert_close(together, alone, rtol=1e-6, atol=0)


def test_outside_training_it_is_the_plain_operator() -> None:
    ours, theirs = pair()
    x = torch.randn(3, 3)
    ours.eval()
    assert torch.equal(ours(x), theirs(x))
    assert "_PReLU" not in str(ours(x).grad_fn)


@pytest.mark.parametrize(
    ("ours", "theirs", "shape"),
    [
        (InstanceNorm2d, torch.nn.InstanceNorm2d, (3, 6, 9, 7)),
        (InstanceNorm3d, torch.nn.InstanceNorm3d, (2, 6, 5, 4, 7)),
    ],
    ids=["2d", "3d"],
)
def test_instance_norm_is_the_same(ours: type, theirs: type, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(4)) * 3 + 100
    weights = torch.randn(shape, generator=torch.Generator().manual_seed(5))
    results = []
    for kind in (ours, theirs):
        module = kind(6, affine=True)
        torch.nn.init.normal_(module.weight, generator=torch.Generator().manual_seed(6))
        inputs = x.clone().requires_grad_()
        out = module(inputs)
        found = torch.autograd.grad((out * weights).sum(), [inputs, module.weight, module.bias])
        results.append((out, *found))
        assert ("NativeGroupNorm" in str(out.grad_fn)) == (kind is ours)
        module.eval()
        assert "GroupNorm" not in str(module(inputs).grad_fn)
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dims", [2, 3])
def test_the_unet_has_them(dims: Literal[2, 3]) -> None:
    network = build_network(ModelSection(name="unet", dims=dims), in_channels=1, out_channels=2, seed=0)
    kinds = {type(module) for module in network.modules()}
    assert (FewChannels2d in kinds) == (dims == 2)
    assert PReLU in kinds and (InstanceNorm2d if dims == 2 else InstanceNorm3d) in kinds
    assert not kinds & {torch.nn.PReLU, torch.nn.InstanceNorm2d, torch.nn.InstanceNorm3d}


def test_convolution_of_few_channels_is_the_same() -> None:
    theirs = torch.nn.Conv2d(2, 2, 3, padding=1)
    ours = FewChannels2d.of(theirs)
    assert ours.weight is theirs.weight and ours.bias is theirs.bias
    x = torch.randn(3, 2, 9, 7, generator=torch.Generator().manual_seed(7))
    results = []
    for module in (ours, theirs):
        inputs = x.clone().requires_grad_()
        out = module(inputs)
        results.append((out, *torch.autograd.grad((out**3).sum(), [inputs, *theirs.parameters()])))
    assert "SlowConv2D" in str(ours(x).grad_fn) and "SlowConv2D" not in str(theirs(x).grad_fn)
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-4)

    def loss(parameters: dict[str, torch.Tensor], images: torch.Tensor) -> torch.Tensor:
        squares: torch.Tensor = functional_call(ours, parameters, (images,)) ** 2
        return squares.mean()

    parameters = {k: v.detach() for k, v in ours.named_parameters()}
    together = vmap(grad(loss), in_dims=(None, 0))(parameters, x[:, None])["weight"]
    alone = torch.stack([grad(loss)(parameters, patient[None])["weight"] for patient in x])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)

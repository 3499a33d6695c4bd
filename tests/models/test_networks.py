# SPDX-License-Identifier: Apache-2.0
"""Networks: shapes, reproducibility, and that they keep patients apart."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedneuro.models.networks import BUILDERS, build_network
from fedneuro.models.networks.unet import FOREGROUND_PRIOR
from fedneuro.models.spec import ModelSection

CASES: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "unet-2d-instance": ({"name": "unet", "dims": 2, "channels": (8, 16, 32)}, (32, 24)),
    "unet-2d-group": ({"name": "unet", "dims": 2, "channels": (8, 16, 32), "norm": "group"}, (32, 24)),
    "unet-2d-plain": ({"name": "unet", "dims": 2, "channels": (8, 16), "residual_units": 0}, (16, 16)),
    "unet-3d-instance": ({"name": "unet", "dims": 3, "channels": (8, 16, 32)}, (16, 16, 8)),
    "unet-3d-group": ({"name": "unet", "dims": 3, "channels": (4, 8), "norm": "group"}, (16, 16, 8)),
    "resnet-2d-instance": ({"name": "resnet", "dims": 2, "channels": (8, 8, 16, 16)}, (64, 80)),
    "resnet-2d-group": ({"name": "resnet", "dims": 2, "channels": (8, 8, 16, 16), "norm": "group"}, (32, 32)),
    "resnet-3d-instance": ({"name": "resnet", "dims": 3, "channels": (4, 4, 8, 8)}, (64, 64, 64)),
    "resnet-3d-group": ({"name": "resnet", "dims": 3, "channels": (4, 4, 8, 8), "norm": "group"}, (32, 32, 32)),
    "resnet-2d-dropout": ({"name": "resnet", "dims": 2, "channels": (8, 8, 16, 16), "dropout": 0.5}, (64, 64)),
}


def make(case: str, seed: int = 0) -> tuple[nn.Module, torch.Tensor, ModelSection]:
    """A network with two modalities and three classes, and a batch of two images for it."""
    values, spatial = CASES[case]
    model = ModelSection(**values)
    network = build_network(model, in_channels=2, out_channels=3, seed=seed)
    return network, torch.randn((2, 2, *spatial), generator=torch.Generator().manual_seed(1)), model


@pytest.mark.parametrize("case", CASES)
def test_logits_have_the_shape_of_the_task(case: str) -> None:
    network, images, model = make(case)
    spatial = tuple(images.shape[2:]) if model.name == "unet" else ()
    assert tuple(network(images).shape) == (2, 3, *spatial)


@pytest.mark.parametrize("case", CASES)
def test_no_layer_mixes_patients_or_works_in_place(case: str) -> None:
    network, _, _ = make(case)
    for name, module in network.named_modules():
        assert not isinstance(module, _BatchNorm), name
        assert not getattr(module, "track_running_stats", False), name
        assert not getattr(module, "inplace", False), name


@pytest.mark.parametrize("case", CASES)
def test_a_forward_pass_changes_no_buffer(case: str) -> None:
    network, images, _ = make(case)
    before = {name: buffer.clone() for name, buffer in network.named_buffers()}
    network.train()(images)
    assert all(torch.equal(buffer, before[name]) for name, buffer in network.named_buffers())


@pytest.mark.parametrize("case", [c for c in CASES if "dropout" not in c])
def test_an_image_does_not_see_its_neighbours(case: str) -> None:
    network, images, _ = make(case)
    outlier = torch.cat([images[:1], 1000 * images[1:] + 500])
    with torch.no_grad():
        torch.testing.assert_close(network.train()(outlier)[:1], network(images[:1]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", ["unet-2d-instance", "resnet-3d-group"])
def test_the_seed_decides_every_bit_and_leaves_the_caller_alone(case: str) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, _, _ = make(case, seed=7)
    assert torch.equal(torch.rand(3), expected), "building a network must not move the caller's generator"
    again, _, _ = make(case, seed=7)
    other, _, _ = make(case, seed=8)
    same = zip(first.parameters(), again.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in same)
    assert any(not torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("case", ["unet-2d-group", "unet-3d-instance", "resnet-2d-instance"])
def test_training_gives_the_same_bits_twice(case: str) -> None:
    def gradients() -> list[torch.Tensor]:
        network, images, _ = make(case)
        return list(torch.autograd.grad(network(images).square().mean(), list(network.parameters())))

    assert all(torch.equal(a, b) for a, b in zip(gradients(), gradients(), strict=True))


@pytest.mark.parametrize("case", ["unet-2d-instance", "unet-2d-group", "unet-2d-plain", "unet-3d-group"])
def test_a_gradient_reaches_every_parameter_of_a_unet(case: str) -> None:
    network, images, _ = make(case)
    network(images).square().mean().backward()
    assert all(p.grad is not None for p in network.parameters())


def test_an_untrained_unet_calls_about_the_prior_foreground() -> None:
    shares = []
    for seed in range(5):
        network, images, _ = make("unet-2d-instance", seed)
        with torch.no_grad():
            shares.append(1 - float(network(images).softmax(1)[:, 0].mean()))
    assert FOREGROUND_PRIOR / 3 < sum(shares) / len(shares) < FOREGROUND_PRIOR * 3


def test_resnet_depth_is_the_number_of_layers() -> None:
    """Depth counts convolutions of the main path and the final linear layer."""
    for depth in (10, 18, 34):
        model = ModelSection(name="resnet", channels=(4, 4, 4, 4), depth=depth)
        network = build_network(model, in_channels=1, out_channels=2, seed=0)
        main = [n for n, m in network.named_modules() if isinstance(m, nn.Conv2d) and "downsample" not in n]
        assert len(main) + 1 == depth


def test_every_name_of_the_study_has_a_builder() -> None:
    names = ModelSection.model_fields["name"].annotation
    assert set(getattr(names, "__args__", ())) == set(BUILDERS)

# SPDX-License-Identifier: Apache-2.0
"""Which parameters are trained: counted by hand on a small U-Net, and refused where a network has no such part."""

import pytest
from torch import nn

from fedneuro.models.networks import build_network
from fedneuro.models.spec import ModelSection, Trainable
from fedneuro.models.trainable import choose_trainable


def unet(**values: object) -> nn.Module:
    model = ModelSection.model_validate({"channels": (4, 8, 16), "residual_units": 0, **values})
    return build_network(model, in_channels=1, out_channels=2, seed=0)


def test_the_parts_of_a_unet() -> None:
    """Two levels and a bottom, one convolution each: kernel, bias, InstanceNorm (scale, shift), PReLU (slope).

    norm+bias: all 1-dimensional parameters: 4 of each of the 4 inner blocks, the bias of the head.
    head: kernel and bias of the last convolution. decoder: the inner upward block and the head.
    """
    network = unet()
    parts: tuple[Trainable, ...] = ("all", "norm+bias", "norm+bias+head", "head", "decoder")
    chosen = {name: choose_trainable(network, name) for name in parts}
    shapes = {name: p.ndim for name, p in network.named_parameters()}
    assert chosen["all"] == list(shapes)
    assert chosen["norm+bias"] == [name for name, ndim in shapes.items() if ndim == 1]
    assert chosen["head"] == list(shapes)[-2:]
    assert set(chosen["norm+bias+head"]) == {*chosen["norm+bias"], *chosen["head"]}
    assert chosen["decoder"] == [n for n in shapes if n.startswith(("model.2.", "model.1.submodule.2."))]
    assert set(chosen["head"]) < set(chosen["decoder"])
    assert [n for n, p in network.named_parameters() if p.requires_grad] == chosen["decoder"], "the last choice holds"


def test_bias_alone_is_enough_for_norm_and_bias_of_a_classifier() -> None:
    network = build_network(
        ModelSection(name="resnet", channels=(4, 4, 4, 4), norm="group"), in_channels=1, out_channels=3, seed=0
    )
    assert choose_trainable(network, "head") == ["fc.weight", "fc.bias"]
    assert "fc.bias" in choose_trainable(network, "norm+bias")
    with pytest.raises(ValueError, match='trainable = "decoder": ResNet has no such parameter; use "all"'):
        choose_trainable(network, "decoder")


def test_unknown_parts_are_refused() -> None:
    with pytest.raises(ValueError, match="choose one of all, norm\\+bias"):
        choose_trainable(unet(), "encoder")  # type: ignore[arg-type]

# SPDX-License-Identifier: Apache-2.0
"""ResNet for classification, 2D and 3D: MONAI's ResNet 10, 18 or 34 with normalisation that keeps patients apart.

MONAI's ``norm=`` reaches only the stem; the blocks stay BatchNorm (seen in MONAI 1.6.1). So the network is
built as MONAI does it and every BatchNorm is replaced afterwards. Activations are made out of place.

Reference: He et al. 2016, Deep Residual Learning for Image Recognition, https://arxiv.org/abs/1512.03385.
"""

from collections.abc import Mapping

from monai.networks.nets.resnet import ResNet
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..spec import ModelSection

__all__ = ["LAYERS", "build"]

LAYERS: Mapping[int, tuple[int, int, int, int]] = {10: (1, 1, 1, 1), 18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}
"""Residual blocks per stage, by ``model.depth``."""


def build(model: ModelSection, in_channels: int, out_channels: int) -> nn.Module:
    """The ResNet that ``model`` describes.

    The stem is a 7-wide convolution of stride 2 and a max-pool, so the image shrinks 32-fold in all: sides of 64
    and more leave a field of at least 2 to the last stage, which InstanceNorm needs.
    """
    network = ResNet(
        "basic",
        list(LAYERS[model.depth]),
        list(model.channels),
        spatial_dims=model.dims,
        n_input_channels=in_channels,
        conv1_t_size=7,
        conv1_t_stride=2,
        num_classes=out_channels,
    )
    _keep_patients_apart(network, model)
    if model.dropout:
        network.add_module("avgpool", nn.Sequential(network.avgpool, nn.Dropout(model.dropout)))
    return network


def _keep_patients_apart(module: nn.Module, model: ModelSection) -> None:
    """Replace every BatchNorm below ``module`` and make ReLUs out of place."""
    for name, child in module.named_children():
        if isinstance(child, _BatchNorm):
            setattr(module, name, _norm(model, child.num_features))
        elif isinstance(child, nn.ReLU):
            setattr(module, name, nn.ReLU(inplace=False))
        else:
            _keep_patients_apart(child, model)


def _norm(model: ModelSection, features: int) -> nn.Module:
    if model.norm == "group":
        return nn.GroupNorm(4, features)
    return nn.InstanceNorm2d(features, affine=True) if model.dims == 2 else nn.InstanceNorm3d(features, affine=True)

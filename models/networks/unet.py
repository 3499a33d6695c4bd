# SPDX-License-Identifier: Apache-2.0
"""U-Net for segmentation, 2D and 3D: MONAI's residual UNet and a plain head.

MONAI's own output block normalises and activates the class channels themselves (with residual units), so
every image's logits get the same spread, whether it shows a lesion or not, and ``GROUP`` with 4 groups cannot
be built for two classes. Here the UNet ends in ``channels[0]`` feature maps and a 1x1 convolution turns them
into logits. The head's bias starts at a public prior, :data:`FOREGROUND_PRIOR`: private training then need
not spend ε on learning that most voxels are background.

Reference: Kerfoot et al. 2018, Left-Ventricle Quantification Using Residual U-Net,
https://doi.org/10.1007/978-3-030-12029-0_40.
"""

import math

import torch
from monai.networks.nets.unet import UNet
from torch import Tensor, nn

from ..spec import ModelSection

__all__ = ["FOREGROUND_PRIOR", "SegmentationUNet", "build"]

FOREGROUND_PRIOR = 0.02
"""Share of voxels that an untrained network calls foreground. A constant, not an estimate from patients."""


class SegmentationUNet(nn.Module):
    """UNet features and a 1x1 head.

    Args:
        model: the ``[model]`` section; ``channels``, ``residual_units``, ``norm``, ``dropout`` and ``dims`` are used.
        in_channels: modalities per image.
        out_channels: classes, background first.
    """

    def __init__(self, model: ModelSection, in_channels: int, out_channels: int) -> None:
        super().__init__()
        features = model.channels[0]
        norm = ("INSTANCE", {"affine": True}) if model.norm == "instance" else ("GROUP", {"num_groups": 4})
        self.features = UNet(
            spatial_dims=model.dims,
            in_channels=in_channels,
            out_channels=features,
            channels=model.channels,
            strides=(2,) * (len(model.channels) - 1),
            num_res_units=model.residual_units,
            norm=norm,
            dropout=model.dropout,
        )
        conv = nn.Conv2d if model.dims == 2 else nn.Conv3d
        self.head = conv(features, out_channels, kernel_size=1)
        _start_at_prior(self.head.bias, out_channels)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(B, out_channels, *spatial)`` of images ``(B, in_channels, *spatial)``."""
        logits: Tensor = self.head(self.features(images))
        return logits


def build(model: ModelSection, in_channels: int, out_channels: int) -> nn.Module:
    """The U-Net that ``model`` describes."""
    return SegmentationUNet(model, in_channels, out_channels)


def _start_at_prior(bias: Tensor | None, classes: int) -> None:
    """Fill ``bias`` so that softmax gives the foreground classes :data:`FOREGROUND_PRIOR` together."""
    if bias is None:
        return
    with torch.no_grad():
        bias.fill_(math.log(FOREGROUND_PRIOR / (classes - 1) / (1 - FOREGROUND_PRIOR)))
        bias[0] = 0.0

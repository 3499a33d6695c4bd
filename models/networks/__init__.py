# SPDX-License-Identifier: Apache-2.0
"""The networks on offer, by the name that a study gives in ``[model] name``.

Every network keeps patients apart: Instance- or GroupNorm only, no running statistics, no buffer that a
forward pass changes. To add one, write a module beside these with a ``build`` of the same signature and
name it in :data:`BUILDERS` and in :class:`fedneuro.models.spec.ModelSection`.
"""

from collections.abc import Callable, Mapping

import torch
from torch import nn

from ..spec import ModelSection
from . import resnet, unet

__all__ = ["BUILDERS", "build_network"]

BUILDERS: Mapping[str, Callable[[ModelSection, int, int], nn.Module]] = {
    "unet": unet.build,
    "resnet": resnet.build,
}


def build_network(model: ModelSection, *, in_channels: int, out_channels: int, seed: int) -> nn.Module:
    """The network of a study, freshly initialised; the same seed gives the same bits.

    Args:
        model: the ``[model]`` section.
        in_channels: modalities per image, at least 1.
        out_channels: classes, at least 2; see :attr:`fedneuro.models.spec.TaskSection.channels`.
        seed: seed of the initialisation. The caller's random state is left as it was.

    Returns:
        A network on the CPU, float32, in training mode, from images ``(B, in_channels, *spatial)`` to logits
        ``(B, out_channels, *spatial)`` (unet) or ``(B, out_channels)`` (resnet).
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return BUILDERS[model.name](model, in_channels, out_channels)

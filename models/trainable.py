# SPDX-License-Identifier: Apache-2.0
"""Which parameters of a network are trained: all of them, or a few of a network that was trained before.

Noise grows with the number of parameters and the signal does not, so private fine-tuning of a few parameters keeps what
public pre-training gave (privacy.md §5: 322 of 53,000 parameters did best). Frozen parameters still travel
with the model to where it is missing; they do not come back.
"""

import re
from collections.abc import Callable, Mapping

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from .spec import Trainable

__all__ = ["choose_trainable", "normalisations"]

_NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm)
_SLOPES = (nn.PReLU,)
# MONAI's UNet nests itself: model = (down, skip(model of the next level), up).
_DECODER = re.compile(r"model(\.1\.submodule)*\.2\.")


def choose_trainable(network: nn.Module, which: Trainable) -> list[str]:
    """Let the named part of ``network`` be trained and freeze the rest.

    Args:
        network: its parameters' ``requires_grad`` is set.
        which: ``all``; ``norm+bias``: scales and shifts of normalisations, slopes of activations and every bias;
            ``head``: the last layer; ``norm+bias+head``: both; ``decoder``: the upward path of a U-Net, with its head.

    Returns:
        Names of the parameters that are trained, in the network's order.

    Raises:
        ValueError: the network has no such part.
    """
    if which not in _CHOICES:
        raise ValueError(f'trainable = "{which}": choose one of {", ".join(_CHOICES)}')
    chosen = _CHOICES[which](network)
    if not chosen:
        raise ValueError(f'trainable = "{which}": {type(network).__name__} has no such parameter; use "all"')
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name in chosen)
    return [name for name, parameter in network.named_parameters() if parameter.requires_grad]


def normalisations(network: nn.Module) -> list[str]:
    """Names of the scales and shifts of normalisation layers, in the network's order."""
    return [
        name
        for name, _ in network.named_parameters()
        if isinstance(network.get_submodule(name.rpartition(".")[0]), _NORMS)
    ]


def _all(network: nn.Module) -> set[str]:
    return {name for name, _ in network.named_parameters()}


def _norm_and_bias(network: nn.Module) -> set[str]:
    return {
        name
        for name, _ in network.named_parameters()
        if name.endswith("bias") or isinstance(network.get_submodule(name.rpartition(".")[0]), (*_NORMS, *_SLOPES))
    }


def _head(network: nn.Module) -> set[str]:
    """The last layer with a weight matrix or kernel."""
    layers = [name for name, p in network.named_parameters() if p.ndim > 1]
    last = layers[-1].rpartition(".")[0] if layers else ""
    return {name for name, _ in network.named_parameters() if layers and name.rpartition(".")[0] == last}


def _decoder(network: nn.Module) -> set[str]:
    return {name for name, _ in network.named_parameters() if _DECODER.match(name)}


_CHOICES: Mapping[str, Callable[[nn.Module], set[str]]] = {
    "all": _all,
    "norm+bias": _norm_and_bias,
    "norm+bias+head": lambda network: _norm_and_bias(network) | _head(network),
    "head": _head,
    "decoder": _decoder,
}

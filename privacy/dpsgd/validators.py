# SPDX-License-Identifier: Apache-2.0
"""Layers and losses that break the promise to a patient: found by kind, named, and where possible replaced.

A register in the manner of Opacus' ``ModuleValidator``: a validator looks at one module (a layer, or a loss) of its
kind and says what is wrong and what to use; a fixer builds the replacement. It sees what it knows. What it does not
know, such as a home-made layer that reads the whole batch, is for the self-test (:mod:`.proof`).

Drop-out is fine (its mask is drawn without looking at patients), and so are shared weights: autograd adds their parts
before the clip. Opacus' own validator is asked as a second opinion; it is not the gate, because it passes
networks on which its hooks then fail (DynUNet, SwinUNETR, ViT, SegResNet in MONAI 1.6).
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.modules.loss import _Loss
from torch.nn.parameter import UninitializedParameter

from ..errors import BadInput

__all__ = ["Finding", "check_loss", "check_network", "findings", "fix", "opacus_objections", "twice_registered"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What is wrong with one module.

    Attributes:
        layer: its dotted name in the network; empty for the network itself.
        kind: its class.
        reason: why it breaks the promise.
        remedy: what to use in its place.
    """

    layer: str
    kind: str
    reason: str
    remedy: str

    def __str__(self) -> str:
        return f"layer {self.layer or '(root)'} is {self.kind}: {self.reason}; {self.remedy}"


Validator = Callable[[nn.Module], tuple[str, str] | None]
Fixer = Callable[[nn.Module], nn.Module]

VALIDATORS: list[tuple[type, Validator]] = []
"""Kinds and their validators; each returns (reason, remedy), or None. Every one whose kind fits is asked."""

FIXERS: list[tuple[type, Fixer]] = []
"""Kinds and what builds the replacement; the first that fits is taken."""


def validator(*kinds: type) -> Callable[[Validator], Validator]:
    """Register a validator for modules of these kinds and their subclasses."""

    def register(function: Validator) -> Validator:
        VALIDATORS.extend((kind, function) for kind in kinds)
        return function

    return register


def fixer(*kinds: type) -> Callable[[Fixer], Fixer]:
    """Register a fixer for modules of these kinds and their subclasses."""

    def register(function: Fixer) -> Fixer:
        FIXERS.extend((kind, function) for kind in kinds)
        return function

    return register


@validator(_BatchNorm)
def _batch_norm(_: nn.Module) -> tuple[str, str]:
    return "its statistics mix patients and are kept without noise", "use InstanceNorm or GroupNorm"


@validator(nn.Module)
def _running_statistics(module: nn.Module) -> tuple[str, str] | None:
    if isinstance(module, _BatchNorm) or not getattr(module, "track_running_stats", False):
        return None
    return "it keeps running statistics of patients without noise", "set track_running_stats=False"


@validator(LazyModuleMixin)
def _lazy(module: nn.Module) -> tuple[str, str] | None:
    if not any(isinstance(p, UninitializedParameter) for p in module.parameters(recurse=False)):
        return None
    return "its size is taken from the first patient it sees", "give its size"


@validator(nn.MultiheadAttention)
def _attention(module: nn.Module) -> tuple[str, str] | None:
    if getattr(module, "batch_first", True):
        return None
    return "its first axis is the sequence, so images of a batch would attend to each other", "set batch_first=True"


@validator(_Loss)
def _loss(module: nn.Module) -> tuple[str, str] | None:
    """Losses of PyTorch and MONAI."""
    if getattr(module, "weight", None) is not None and getattr(module, "reduction", "") == "mean":
        return "class weights are normalised over the batch, which couples patients", "leave the weights out"
    if getattr(module, "batch", False):
        return "batch=True couples patients", "set batch=False"
    if (reduction := getattr(module, "reduction", "mean")) not in ("mean", None):
        return f'reduction="{reduction}" is not a mean over images', 'use reduction="mean"'
    return None


@fixer(_BatchNorm)
def _to_group_norm(module: nn.Module) -> nn.Module:
    features = int(module.num_features)  # type: ignore[arg-type]
    groups = math.gcd(32, features)
    return nn.GroupNorm(groups, features, eps=float(module.eps), affine=bool(module.affine))  # type: ignore[arg-type]


@fixer(_InstanceNorm)
def _without_statistics(module: nn.Module) -> nn.Module:
    kind: Any = type(module)
    if not module.track_running_stats:
        return module
    fresh: nn.Module = kind(module.num_features, eps=module.eps, affine=module.affine)
    fresh.load_state_dict(dict(module.named_parameters()))
    return fresh


def findings(network: nn.Module) -> Iterator[Finding]:
    """Everything the register knows to be wrong with ``network``."""
    for name, module in network.named_modules():
        for kind, function in VALIDATORS:
            if issubclass(type(module), kind) and (found := function(module)) is not None:
                yield Finding(layer=name, kind=type(module).__name__, reason=found[0], remedy=found[1])


def check_network(network: nn.Module) -> None:
    """Refuse a network that mixes patients or keeps statistics of them.

    Raises:
        BadInput: naming the first layer, why it breaks the promise, what to use, and how many more there are.
    """
    found = list(findings(network))
    if found:
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        raise BadInput(f"{found[0]}{more}")
    if objections := opacus_objections(network):
        raise BadInput(f"Opacus' validator objects to the network: {objections[0]}")


def check_loss(loss: object) -> None:
    """Refuse a loss module that the register knows to couple patients; a plain function is for the self-test.

    Raises:
        BadInput: naming the loss, why, and what to use.
    """
    if isinstance(loss, nn.Module):
        for found in findings(loss):
            place = f" (its part {found.layer})" if found.layer else ""
            raise BadInput(f"loss {found.kind}{place}: {found.reason}; {found.remedy}")


def fix(network: nn.Module) -> nn.Module:
    """Replace in place every layer that has a fixer: BatchNorm by GroupNorm, running statistics by none.

    The result is another network, to be trained from new: a replaced BatchNorm's weights are not carried over.
    Returns ``network``, or its replacement where it is such a layer itself.
    """
    for name, module in list(network.named_children()):
        setattr(network, name, fix(module))
    for kind, function in FIXERS:
        if isinstance(network, kind):
            return function(network).train(network.training)
    return network


def twice_registered(network: nn.Module) -> list[str]:
    """Names of modules that are in the network under a second name: hooks would count their gradient twice."""
    seen: set[nn.Module] = set()
    again = []
    for name, module in network.named_modules(remove_duplicate=False):
        if module in seen and any(p.requires_grad for p in module.parameters(recurse=False)):
            again.append(name)
        seen.add(module)
    return again


def opacus_objections(network: nn.Module) -> list[str]:
    """What the rules of Opacus' ``ModuleValidator`` say against layers of ``network``, by layer.

    Left out are the kinds that it refuses for what its hooks cannot do (attention, recurrent layers): they do not
    mix patients, and :class:`~.hooks.OpacusHooks` finds out about them by itself.
    """
    from opacus.validators import ModuleValidator

    objections = []
    for name, module in network.named_modules():
        rule: Any = ModuleValidator.VALIDATORS.get(type(module))
        if rule is not None and not isinstance(module, (nn.MultiheadAttention, nn.RNNBase)):
            objections += [f"layer {name or '(root)'}: {error}" for error in rule(module)]
    return objections

# SPDX-License-Identifier: Apache-2.0
"""Layers of the U-Nets that train faster on CPU than PyTorch's own: same parameters, names and formula.

A training step of a 2D U-Net takes a sixth to a fifth less time with them.

- :class:`PReLU`: PyTorch's backward goes through its general iterator, element by element. A slope that all channels
  share needs no such generality: the input's gradient is that of a leaky ReLU, the slope's is one sum. Under
  ``torch.func.vmap`` it stays whole: the patients are laid behind each other, and only the slope's gradient is summed
  per patient.
- :class:`InstanceNorm2d`, :class:`InstanceNorm3d`: PyTorch repeats weights for every image and calls BatchNorm. One
  channel per group is the same formula, and the kernel of GroupNorm needs no repeats.
- :class:`FewChannels2d`: oneDNN pads channels to blocks of 16, so the last convolution, of two classes, takes as long
  as one of 16. PyTorch's own kernel (columns and a matrix product) needs a third of that.

In evaluation, in half precision (all but PReLU) and on a GPU they are PyTorch's own, so exports do not know them.
"""

from typing import Any

import torch
from monai.networks.layers.factories import Norm
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["FewChannels2d", "InstanceNorm2d", "InstanceNorm3d", "PReLU"]

# An operator of its own, because it reads the slope's value: a trace of the network (vmap's) may hold the operator, not
# a value that changes with every step.
_OPERATOR = "fedneuro::prelu_backward"


def _prelu_backward(grad: Tensor, x: Tensor, slope: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Gradients of x, and of the slope per group ``(groups,)``; the groups are equal parts of x's first axis."""
    below = torch.ops.aten.leaky_relu_backward(grad, x, slope.item(), False)
    return below, x.clamp(max=0).mul_(grad).reshape(groups, -1).sum(1, dtype=slope.dtype)


class PReLU(nn.PReLU):
    """:class:`torch.nn.PReLU` with one slope; parameters, names and results are the same."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  the name that torch.nn.PReLU gives it
        """Negative values times the slope.

        Args:
            input: any shape.
        """
        if self.training and torch.is_grad_enabled() and input.device.type == "cpu" and self.num_parameters == 1:
            found: Tensor = _PReLU.apply(input, self.weight.to(input.dtype))  # type: ignore[no-untyped-call]
            return found
        return super().forward(input)


class InstanceNorm2d(nn.InstanceNorm2d):
    """:class:`torch.nn.InstanceNorm2d` through the kernel of GroupNorm."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  as in torch.nn
        """Each channel of each image normalised.

        Args:
            input: ``(B, C, H, W)``.
        """
        return _as_groups(self, input) if _groups_will_do(self, input) else super().forward(input)


class InstanceNorm3d(nn.InstanceNorm3d):
    """:class:`torch.nn.InstanceNorm3d` through the kernel of GroupNorm."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  as in torch.nn
        """Each channel of each image normalised.

        Args:
            input: ``(B, C, D, H, W)``.
        """
        return _as_groups(self, input) if _groups_will_do(self, input) else super().forward(input)


Norm.add_factory_callable("fast_instance", lambda dims: {2: InstanceNorm2d, 3: InstanceNorm3d}[dims])


def _groups_will_do(module: nn.InstanceNorm2d | nn.InstanceNorm3d, x: Tensor) -> bool:
    plain = module.affine and not module.track_running_stats and x.dtype == module.weight.dtype
    return module.training and plain and x.device.type == "cpu"


def _as_groups(module: nn.InstanceNorm2d | nn.InstanceNorm3d, x: Tensor) -> Tensor:
    return F.group_norm(x, module.num_features, module.weight, module.bias, module.eps)


class FewChannels2d(nn.Conv2d):
    """:class:`torch.nn.Conv2d` for a few channels, zero padding, no groups and no dilation."""

    @classmethod
    def of(cls, conv: nn.Conv2d) -> "FewChannels2d":
        """The same convolution with the same parameters; the caller knows that this kernel suits it."""
        shape: dict[str, Any] = {key: getattr(conv, key) for key in ("kernel_size", "stride", "padding")}
        made = cls(conv.in_channels, conv.out_channels, **shape, bias=conv.bias is not None)
        made.weight, made.bias = conv.weight, conv.bias
        return made

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  as in torch.nn
        """Convolve.

        Args:
            input: ``(B, in_channels, H, W)``.
        """
        alone = not torch._C._are_functorch_transforms_active()  # vmap knows the ordinary operator only
        plain = input.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
        if self.training and plain and alone and input.device.type == "cpu":
            found: Tensor = torch.ops.aten.thnn_conv2d(
                input, self.weight, self.kernel_size, self.bias, self.stride, self.padding
            )
            return found
        return super().forward(input)


class _PReLU(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, slope: Tensor) -> Tensor:
        return torch.prelu(x, slope)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:  # noqa: ARG004  as PyTorch calls it
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        below, slopes = torch.ops.fedneuro.prelu_backward(grads[0], *ctx.saved_tensors, 1)
        return below, slopes

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Any) -> Any:
        x, slope = _folded(info, in_dims, inputs)
        return _PReLU.apply(x, slope).unflatten(0, (info.batch_size, -1)), 0  # type: ignore[no-untyped-call]


def _vmap_backward(info: Any, in_dims: Any, grad: Tensor, x: Tensor, slope: Tensor, groups: int) -> Any:
    patients = info.batch_size
    grad, x, slope = _folded(info, in_dims[:3], (grad, x, slope))
    below, slopes = torch.ops.fedneuro.prelu_backward(grad, x, slope, patients * groups)
    return (below.unflatten(0, (patients, -1)), slopes.unflatten(0, (patients, groups))), (0, 0)


def _folded(info: Any, in_dims: Any, inputs: Any) -> tuple[Tensor, ...]:
    """Inputs with the patients' axis folded into the first one; the last input is the slope, which has no such axis."""
    if in_dims[-1] is not None:
        raise RuntimeError("the slope of a PReLU differs between patients: one network serves them all")

    def fold(value: Tensor, dim: int | None) -> Tensor:
        value = value.expand(info.batch_size, *value.shape) if dim is None else value.movedim(dim, 0)
        return value.flatten(0, 1)

    return *(fold(v, d) for v, d in zip(inputs[:-1], in_dims[:-1], strict=True)), inputs[-1]


if not hasattr(torch.ops.fedneuro, "prelu_backward"):  # a released bundle holds a copy of this module
    torch.library.define(_OPERATOR, "(Tensor grad, Tensor x, Tensor slope, int groups) -> (Tensor, Tensor)")
    torch.library.impl(_OPERATOR, "cpu", _prelu_backward)
    torch.library.register_vmap(_OPERATOR, _vmap_backward)

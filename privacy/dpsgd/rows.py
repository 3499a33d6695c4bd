# SPDX-License-Identifier: Apache-2.0
"""Instance and group normalisation that stay fused under ``torch.func.vmap``.

PyTorch takes a batched normalisation apart into a dozen passes over memory, forward and backward. But its statistics
are per image and channel: rows of the image are normalised by themselves, and whose row it is does not matter. So
the patients are laid below each other as more rows, and one fused kernel does the work; the weight's gradient
comes out per row and is summed per patient only. Same formula, same kernel as without ``vmap``.

:class:`FusedNorms` is active while :mod:`.paths` traces a network; nothing else is changed.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

__all__ = ["FusedNorms"]


class FusedNorms(TorchFunctionMode):
    """Within it, affine ``instance_norm`` and ``group_norm`` without running statistics go row by row."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Send the two normalisations to the fused rows, everything else to where it was going."""
        kwargs = kwargs or {}
        if func is F.instance_norm:
            fused = _instance_norm(*args, **kwargs)
        elif func is F.group_norm:
            fused = _group_norm(*args, **kwargs)
        else:
            fused = None
        return func(*args, **kwargs) if fused is None else fused


def _instance_norm(
    x: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor | None:
    del running_var, momentum
    if running_mean is not None or not use_input_stats:
        return None
    return _rows(x, 1, weight, bias, eps)


def _group_norm(
    x: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor | None:
    return _rows(x, x.shape[1] // num_groups, weight, bias, eps)


def _rows(x: Tensor, per_group: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor | None:
    """Normalise ``x`` ``(B, C, *spatial)`` over groups of ``per_group`` channels; None where it cannot be fused."""
    if weight is None or bias is None:
        return None
    if per_group > 1:
        x = x.to(weight.dtype)  # as autocast does: the kernel of a group takes one type
    batch, channels = x.shape[:2]
    scale, shift = weight.expand(batch, channels).reshape(-1), bias.expand(batch, channels).reshape(-1)
    rows = x.reshape(batch * channels, -1)
    normed: Tensor = _Rows.apply(rows, scale, shift, per_group, eps)[0]  # type: ignore[no-untyped-call]
    return normed.reshape(x.shape)


class _Rows(torch.autograd.Function):
    """Rows ``(M, L)``, scale ``(M,)``, shift ``(M,)`` to normalised rows, mean and 1/deviation per group."""

    @staticmethod
    def forward(rows: Tensor, scale: Tensor, shift: Tensor, per_group: int, eps: float) -> Any:
        m, length = rows.shape
        if per_group == 1:
            out, mean, inverse = torch.native_batch_norm(rows[None], scale, shift, None, None, True, 0.0, eps)
        else:
            out, mean, inverse = torch.native_group_norm(rows[None], scale, shift, 1, m, length, m // per_group, eps)
        return out[0], mean.reshape(-1), inverse.reshape(-1)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        rows, scale, _, ctx.per_group, ctx.eps = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(rows, scale, *output[1:])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return *_RowsBackward.apply(grads[0], *ctx.saved_tensors, ctx.per_group, ctx.eps), None, None  # type: ignore[no-untyped-call]

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Any) -> Any:
        return _patients_as_rows(_Rows, info.batch_size, in_dims, inputs)


class _RowsBackward(torch.autograd.Function):
    """Gradients of rows, scale and shift."""

    @staticmethod
    def forward(
        grad: Tensor, rows: Tensor, scale: Tensor, mean: Tensor, inverse: Tensor, per_group: int, eps: float
    ) -> Any:
        m, length = rows.shape
        mask = [True, True, True]
        grad = grad.contiguous()[None]
        if per_group == 1:
            found = torch.ops.aten.native_batch_norm_backward(
                grad, rows[None], scale, None, None, mean, inverse, True, eps, mask
            )
        else:
            mean, inverse = mean[None], inverse[None]
            found = torch.ops.aten.native_group_norm_backward(
                grad, rows[None], mean, inverse, scale, 1, m, length, m // per_group, mask
            )
        return found[0][0], found[1], found[2]

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Nothing to keep: it is differentiated once only."""

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Any) -> Any:
        return _patients_as_rows(_RowsBackward, info.batch_size, in_dims, inputs)


def _patients_as_rows(function: Any, patients: int, in_dims: Any, inputs: Any) -> Any:
    """Fold the patients' axis into the rows, apply, unfold."""

    def fold(value: Any, dim: int | None) -> Any:
        if not isinstance(value, Tensor):
            return value
        return (value.expand(patients, *value.shape) if dim is None else value.movedim(dim, 0)).flatten(0, 1)

    found = function.apply(*(fold(value, dim) for value, dim in zip(inputs, in_dims, strict=True)))
    return tuple(part.unflatten(0, (patients, -1)) for part in found), (0,) * len(found)

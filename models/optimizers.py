# SPDX-License-Identifier: Apache-2.0
"""Optimisers, for plain gradients and for gradients with noise of a known size.

Used by a hospital for its own steps, and by the coordinator where hospitals share a step. SGD needs no change
under noise. Adam does: noise of deviation s on a gradient adds s² to its second moment, which makes all coordinates
look alike and turns Adam into SGD with a small step. :class:`NoisedAdam` takes s² away again; s is public.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .state import Arrays

__all__ = ["NoisedAdam", "build_optimizer", "optimizer_arrays", "restore_optimizer"]


def build_optimizer(
    name: str,
    parameters: Iterable[nn.Parameter],
    learning_rate: float,
    *,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    noised: bool = False,
) -> torch.optim.Optimizer:
    """The optimiser of a study's ``[training]``.

    Args:
        name: ``sgd``, ``adam`` or ``adamw``.
        parameters: those that are trained.
        learning_rate: step size, above 0.
        momentum: of sgd, from 0 to below 1.
        weight_decay: added to the gradient (sgd, adam) or taken off the weights (adamw).
        noised: the gradients will carry noise; Adam then corrects for it, see :class:`NoisedAdam`.
    """
    chosen = list(parameters)
    if name == "sgd":
        return torch.optim.SGD(chosen, learning_rate, momentum=momentum, weight_decay=weight_decay)
    if noised:
        return NoisedAdam(chosen, learning_rate, weight_decay=weight_decay, decoupled=name == "adamw")
    kind = torch.optim.Adam if name == "adam" else torch.optim.AdamW
    return kind(chosen, learning_rate, weight_decay=weight_decay)


class NoisedAdam(torch.optim.Optimizer):
    """Adam with the bias of the noise taken out of its second moment.

    With m and v the running means of g and g², corrected for their start as in Adam, and s the noise's deviation:

        step = learning rate · m / (sqrt(max(v - s², floor)) + eps)

    The floor is the standard error of v from noise alone, s²·sqrt(2 Σw²) with w the weights of the running mean: about
    1.4 s² at the first step, 0.03 s² in the long run. A coordinate whose v is not above s² by more than that is not
    told from noise, and takes no larger step than noise would. With s = 0 this is Adam.

    Args:
        parameters: those that are trained; one without a gradient is left alone.
        learning_rate: step size.
        betas: decay of the running means of g and g².
        eps: against division by 0.
        weight_decay: share; see ``decoupled``.
        decoupled: take the decay off the weights (AdamW) instead of adding it to the gradient.

    References: Tang, Shpilevskiy, Lécuyer 2023, DP-AdamBC, https://arxiv.org/abs/2312.14334 (there with a tuned
    constant as floor); Kingma and Ba 2015.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        learning_rate: float,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        decoupled: bool = False,
    ) -> None:
        defaults = {"lr": learning_rate, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(parameters, defaults)
        self.noise_std = 0.0
        """Deviation s of the noise on each number of the coming gradient, at least 0; public."""
        self._decoupled = decoupled

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step on the ``.grad`` of the parameters; ``closure`` is only for the interface: leave it out."""
        if closure is not None:
            raise TypeError("a noised gradient is made once: NoisedAdam takes no closure")
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        return None

    def _update(self, parameter: Tensor, group: Mapping[str, Any]) -> None:
        grad = parameter.grad
        assert grad is not None  # noqa: S101 - step looked
        rate, (beta1, beta2) = group["lr"], group["betas"]
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        state["step"] += 1
        count = int(state["step"].item())
        mean, square = state["exp_avg"], state["exp_avg_sq"]
        if group["weight_decay"] and self._decoupled:
            parameter.mul_(1 - rate * group["weight_decay"])
        elif group["weight_decay"]:
            grad = grad.add(parameter, alpha=group["weight_decay"])
        mean.lerp_(grad, 1 - beta1)
        square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        noise = self.noise_std**2
        second = square / (1 - beta2**count)
        if noise:
            second.sub_(noise).clamp_(min=noise * _relative_error(beta2, count))
        parameter.addcdiv_(mean, second.sqrt_().add_(group["eps"]), value=-rate / (1 - beta1**count))


def _relative_error(beta: float, count: int) -> float:
    """Relative standard error of a running mean of squares of normal numbers after ``count`` steps: sqrt(2 Σw²)."""
    weights = (1 - beta) ** 2 * (1 - beta ** (2 * count)) / ((1 - beta**2) * (1 - beta**count) ** 2)
    return math.sqrt(2 * weights)


def optimizer_arrays(optimizer: torch.optim.Optimizer) -> Arrays:
    """The optimiser's state as arrays ``<parameter's index>/<name>``, to be saved; empty before the first step."""
    return {
        f"{index}/{key}": value.detach().cpu().numpy()
        for index, state in optimizer.state_dict()["state"].items()
        for key, value in state.items()
        if isinstance(value, Tensor)
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, arrays: Arrays) -> None:
    """Put back what :func:`optimizer_arrays` gave, into an optimiser built in the same way."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, array in arrays.items():
        index, key = name.split("/", 1)
        state.setdefault(int(index), {})[key] = torch.from_numpy(array.copy())
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})

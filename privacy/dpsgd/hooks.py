# SPDX-License-Identifier: Apache-2.0
"""The ``opacus`` path: per-crop gradients from Opacus' hooks, averaged per patient *before* the clip.

Where it holds: on networks whose every trainable layer is registered once, without in-place operations on what the
hooks keep, and whose loss is a mean over images. Then Opacus' ``grad_sample`` is the gradient of each crop, and the
mean over a patient's K crops is that patient's gradient. Clipping stays with
:class:`~.gradient.PatientGradient`: Opacus' optimiser clips per sample, so a patient of K crops would
contribute up to K·C.

Where not (MONAI 1.6, Opacus 1.6, measured): ResNet and SegResNet (``out += residual``), DynUNet (modules registered
twice, gradients count double), SwinUNETR (buffers), ViT (parameters on the root). Ghost clipping is not on offer:
with a loss of shape (B, 1, 1, 1) such as MONAI's Dice it let a patient contribute 24 C. It is two to three times slower
than the other paths and serves as a second opinion. The self-test decides for the network at hand.
"""

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from ..errors import BadInput
from .paths import Loss, trainable
from .validators import twice_registered

__all__ = ["OpacusHooks"]


class OpacusHooks:
    """Per-patient gradients by Opacus' ``GradSampleModule``; float32 only.

    Args:
        network: see :func:`~.paths.trainable`. It has hooks during a call only.
        loss: a mean over images.
        patients: at once; the last group is filled up.

    Raises:
        BadInput: Opacus refuses the network, or its hooks would count a layer twice.
    """

    def __init__(self, network: nn.Module, loss: Loss, *, patients: int = 4) -> None:
        self.name, self.patients = "opacus hooks", patients
        if again := twice_registered(network):
            raise BadInput(
                f"layer {again[0]} is in the network twice, so Opacus would count its gradient twice; "
                'use privacy.engine = "auto"'
            )
        self._network, self._loss = network, loss
        self._parameters = list(trainable(network).values())
        self._hook().to_standard_module()

    def gradients(self, images: Tensor, labels: Tensor) -> tuple[list[Tensor | None], Tensor]:
        """See :class:`~.paths.Path`."""
        patients, crops = images.shape[:2]
        modes = {module: module.training for module in self._network.modules()}
        # Hooks note every pass through the network, also one that is not theirs; so they stay for one call only.
        hooked = self._hook()
        try:
            for module in modes:  # hooks look at modules in training mode alone; drop-out keeps its own
                module.training = modes[module] or not isinstance(module, _DropoutNd)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Full backward hook is firing")  # images need no gradient
                logits = hooked(images.flatten(0, 1))
                losses = torch.stack(
                    [self._loss(part.float(), truth) for part, truth in zip(logits.split(crops), labels, strict=True)]
                )
                losses.mean().backward()  # type: ignore[no-untyped-call]
            found = [_per_patient(p, patients, crops) for p in self._parameters]
        except (ValueError, RuntimeError, AttributeError) as error:  # RuntimeError: also what Opacus has no rule for
            raise BadInput(_cannot(self._network, error)) from error
        finally:
            hooked.to_standard_module()
            for module, mode in modes.items():
                module.training = mode
            for parameter in self._parameters:
                parameter.grad = None
        return found, losses.detach()

    def _hook(self) -> Any:
        from opacus import GradSampleModule

        try:
            return GradSampleModule(self._network, loss_reduction="mean")
        except (ValueError, RuntimeError) as error:
            raise BadInput(_cannot(self._network, error)) from error


def _per_patient(parameter: nn.Parameter, patients: int, crops: int) -> Tensor | None:
    samples: Any = getattr(parameter, "grad_sample", None)
    if samples is None:
        return None
    if isinstance(samples, list):  # used several times in one pass
        samples = torch.stack(samples).sum(0)
    grouped: Tensor = samples.detach().reshape(patients, crops, *parameter.shape)
    return grouped.mean(1)


def _cannot(network: nn.Module, error: Exception) -> str:
    what = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return f'{type(network).__name__}: Opacus\' hooks cannot be used ({what[:160]}); use privacy.engine = "auto"'

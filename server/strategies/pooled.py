# SPDX-License-Identifier: Apache-2.0
"""One optimiser step of the coordinator on the noised mean gradient over all hospitals: mode ``distributed``.

DP-SGD as if the patients were in one place (Abadi et al. 2016, https://arxiv.org/abs/1607.00133, Algorithm 1; over
hospitals: Kaissis et al. 2021, https://doi.org/10.1038/s42256-021-00337-8): the optimiser that the study names steps on
the model's trainable parameters, with the study's schedule. Everything here is post-processing of a private sum.
"""

import math
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray

from ...models.networks import build_network
from ...models.optimizers import NoisedAdam, build_optimizer, optimizer_arrays, restore_optimizer
from ...models.state import load_arrays, to_arrays
from ...models.trainable import choose_trainable
from ...privacy.contract import Arrays
from ...privacy.study import Study

__all__ = ["PooledStep"]

_GROUP = "optimizer"


class PooledStep:
    """The optimiser of a study at the coordinator; :meth:`state` is saved with each round, so a resume is exact.

    Attributes:
        size: number of trainable parameters: the length of a gradient.
    """

    def __init__(self, study: Study) -> None:
        self._study = study
        self._network = build_network(
            study.model, in_channels=len(study.data.modalities), out_channels=study.task.channels, seed=study.study.seed
        )
        choose_trainable(self._network, study.training.trainable)
        self._parameters = [p for p in self._network.parameters() if p.requires_grad]
        self.size = sum(p.numel() for p in self._parameters)
        training = study.training
        self._optimizer = build_optimizer(
            training.optimizer,
            self._parameters,
            training.learning_rate,
            momentum=training.momentum,
            weight_decay=training.weight_decay,
            noised=True,
        )

    def step(
        self, number: int, model: Arrays, gradient: NDArray[np.float64], noise_std: float
    ) -> dict[str, NDArray[np.generic]]:
        """The model after round ``number`` (from 1).

        Args:
            number: round; gives the place in the learning-rate schedule.
            model: the global model before it.
            gradient: mean clipped gradient with its noise, ``(size,)``, in the order of the network's parameters.
            noise_std: standard deviation of that noise, public; Adam corrects for it.

        Raises:
            ValueError: the gradient has another length.
        """
        if gradient.shape != (self.size,):
            raise ValueError(f"gradient of shape {gradient.shape}; expected ({self.size},)")
        load_arrays(self._network, model)
        flat = torch.from_numpy(gradient.astype(np.float32))
        for parameter, part in zip(
            self._parameters, torch.split(flat, [p.numel() for p in self._parameters]), strict=True
        ):
            parameter.grad = part.view(parameter.shape)
        for group in self._optimizer.param_groups:
            group["lr"] = self._rate(number)
        if isinstance(self._optimizer, NoisedAdam):
            self._optimizer.noise_std = noise_std
        self._optimizer.step()
        return to_arrays(self._network)

    def state(self) -> Mapping[str, Arrays]:
        """Momentum and the like, by group name; empty where the optimiser keeps nothing."""
        arrays = {name: array.copy() for name, array in optimizer_arrays(self._optimizer).items()}
        return {_GROUP: arrays} if arrays else {}

    def load_state(self, state: Mapping[str, Arrays]) -> None:
        """Take back what :meth:`state` gave."""
        restore_optimizer(self._optimizer, state.get(_GROUP, {}))

    def _rate(self, number: int) -> float:
        training = self._study.training
        if training.schedule == "constant":
            return training.learning_rate
        return training.learning_rate * 0.5 * (1 + math.cos(math.pi * (number - 1) / training.rounds))

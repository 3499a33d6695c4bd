# SPDX-License-Identifier: Apache-2.0
"""One study at one site: what stays warm between rounds (data, network, loss, optimiser)."""

import hashlib
import platform
from functools import cache
from importlib.metadata import PackageNotFoundError, version

import numpy as np
import torch

from ..models.heap import keep_heap
from ..models.losses import build_loss
from ..models.networks import build_network
from ..models.state import load_arrays, to_arrays
from ..models.trainable import choose_trainable
from ..privacy.contract import Arrays, Role, check_arrays, shapes_of
from ..privacy.dpsgd import Path, check_loss, check_network, choose_path, self_test
from ..privacy.study import Study
from .data import Crops, open_site
from .settings import SiteSettings

__all__ = ["Session", "software_versions", "stream"]


def stream(study: Study, *names: str | int) -> np.random.Generator:
    """A generator of its own for each use (site, round, step, patient), the same in every engine.

    It serves crops, augmentation and batch order. Privacy noise and patient sampling never come from here.
    """
    text = "\0".join(map(str, (study.study.seed, *names)))
    return np.random.default_rng(int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "big"))


@cache
def software_versions() -> dict[str, str]:
    """Versions of what computes, as they go into the manifest of a run."""
    found = {"python": platform.python_version()}
    for package in ("fedneuro", "torch", "monai", "flwr", "opacus", "dp-accounting", "nibabel", "numpy", "SimpleITK"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


class Session:
    """Opened data and network of one study at one site.

    Raises:
        DataError: the data set does not fit the study.
        BadInput, Refused: the network cannot be trained under the study's privacy.
    """

    def __init__(self, settings: SiteSettings, study: Study) -> None:
        self.settings = settings
        self.study = study
        self.folder = settings.state / study.hash[:16]
        self.data = open_site(
            settings.data,
            study,
            cache=settings.cache or settings.state / "cache",
            site=settings.name,
            limit=settings.cache_bytes,
        )
        wanted = study.training.device
        self.device = torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")
        if self.device.type == "cpu":
            keep_heap()
        self.network = build_network(
            study.model, in_channels=len(study.data.modalities), out_channels=study.task.channels, seed=study.study.seed
        ).to(self.device)
        choose_trainable(self.network, study.training.trainable)
        self.loss = build_loss(study.training.loss, study.task)
        self.shapes = shapes_of(to_arrays(self.network))
        heldout = settings.role is Role.HELDOUT
        self.notes: list[str] = []
        """Lines for the site's own log, not yet written."""
        self.path: Path | None = None
        """How gradients of single patients are computed; None where nothing is private."""
        if study.privacy.mode != "none" and not heldout:
            self.path = self._prove_privacy()
        self.evaluated = self.data.patients if heldout else self.data.validation()
        self.trained: tuple[str, ...] = () if heldout else self.data.training()
        self.crops = None if heldout else Crops(self.data, self.trained, study)
        self.optimizer: torch.optim.Optimizer | None = None
        self.optimizer_round = 0

    def _prove_privacy(self) -> Path:
        """Choose how to compute, and refuse it if the bound on a patient's contribution does not hold, by trying it."""
        study, privacy = self.study, self.study.privacy
        check_network(self.network)
        check_loss(self.loss)
        shape = (privacy.crops_per_patient, len(study.data.modalities), *study.data.patch)
        choice = choose_path(
            self.network,
            self.loss,
            shape,
            engine=privacy.engine,
            autocast=torch.bfloat16 if study.training.precision == "bfloat16" else None,
            physical_batch=privacy.physical_batch,
            expected_patients=privacy.sample_rate * self.public_training_size,
            steps=study.total_steps,
            # Mode distributed rounds every patient's gradient by itself.
            most_patients=1 if privacy.mode == "distributed" else 4,
        )
        self.notes.append(f"gradients of patients: {choice.reason}")
        self_test(self.network, self.loss, shape, privacy.clip, path=choice.path, clipping=privacy.clipping)
        return choice.path

    def take_notes(self) -> list[str]:
        """Lines for the site's own log since the last call."""
        notes, self.notes = self.notes, []
        return notes

    @property
    def public_training_size(self) -> float:
        """Public stand-in for the number of training patients: cohort size × (1 - validation share)."""
        return self.settings.public_size * (1 - self.study.evaluation.validation_fraction)

    @property
    def public_evaluated(self) -> int:
        """Public stand-in for the number of evaluated patients: all of a held-out site, else the validation share."""
        size = self.settings.public_size
        if self.settings.role is Role.HELDOUT:
            return size
        return max(1, round(size * self.study.evaluation.validation_fraction))

    def load(self, arrays: Arrays) -> None:
        """Check the global model against the contract and put it into the network."""
        check_arrays(arrays, self.shapes)
        load_arrays(self.network, arrays)

# SPDX-License-Identifier: Apache-2.0
"""A site's optimiser and its state, which belongs to the site and lives on between rounds.

After each round the state is written to the site's folder under the round's number (the last two stay), so a
node, a worker or a coordinator that dies resumes with the same bits.
"""

import math
from pathlib import Path

import torch

from ..models.optimizers import build_optimizer, optimizer_arrays, restore_optimizer
from ..models.state import load_saved, save_arrays
from .session import Session

__all__ = ["keep_optimizer", "optimizer_for", "set_learning_rate"]


def set_learning_rate(session: Session, optimizer: torch.optim.Optimizer, step: int, total: int) -> None:
    """Learning rate of the study-wide ``step`` (from 0) of ``total``."""
    rate = session.study.training.learning_rate
    if session.study.training.schedule == "cosine":
        rate *= 0.5 * (1 + math.cos(math.pi * step / total))
    for group in optimizer.param_groups:
        group["lr"] = rate


def optimizer_for(session: Session, number: int) -> torch.optim.Optimizer:
    """The optimiser as it stood after the round before, from memory or from the site's folder."""
    training = session.study.training
    if training.optimizer_state == "keep" and session.optimizer is not None and session.optimizer_round == number - 1:
        return session.optimizer
    parameters = [p for p in session.network.parameters() if p.requires_grad]
    optimizer = build_optimizer(
        training.optimizer,
        parameters,
        training.learning_rate,
        momentum=training.momentum,
        weight_decay=training.weight_decay,
        noised=session.study.privacy.mode != "none",
    )
    if training.optimizer_state == "keep" and number > 1:
        _restore(session.folder, number, optimizer)
    return optimizer


def keep_optimizer(session: Session, number: int, optimizer: torch.optim.Optimizer) -> None:
    """Keep the optimiser after round ``number``, in memory and on disk."""
    if session.study.training.optimizer_state == "reset":
        return
    session.optimizer, session.optimizer_round = optimizer, number
    tensors = optimizer_arrays(optimizer)
    if not tensors:
        return
    session.folder.mkdir(parents=True, exist_ok=True)
    save_arrays(_state_file(session.folder, number), tensors, {"study_hash": session.study.hash, "round": str(number)})
    _state_file(session.folder, number - 2).unlink(missing_ok=True)


def _restore(folder: Path, number: int, optimizer: torch.optim.Optimizer) -> None:
    """Load the newest state from before ``number``: the last round's, or an older one if this site missed rounds."""
    earlier = sorted(p for p in folder.glob("optimizer-*.safetensors") if p < _state_file(folder, number))
    if not earlier:
        return
    arrays, _ = load_saved(earlier[-1])
    restore_optimizer(optimizer, arrays)


def _state_file(folder: Path, number: int) -> Path:
    return folder / f"optimizer-{number:05d}.safetensors"

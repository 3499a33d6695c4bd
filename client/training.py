# SPDX-License-Identifier: Apache-2.0
"""Local training between two rounds, plain or under patient-level differential privacy.

Both paths share the network, the crops, the optimiser and the learning-rate schedule; they differ in how a
step's gradient is made. Plain: the mean loss over a batch of crops. Private: see
:mod:`fedneuro.privacy.dpsgd`; the budget is reserved in the ledger, on disk, before the first step.
"""

import math
import time

import torch

from ..models.state import to_arrays
from ..privacy.contract import Arrays, Receipt, TrainReply
from ..privacy.errors import FedNeuroError, Reason
from .optimizers import keep_optimizer, optimizer_for, set_learning_rate
from .private_training import private_steps
from .session import Session, stream

__all__ = ["train"]


def train(session: Session, number: int, arrays: Arrays, receipt: Receipt | None = None) -> TrainReply:
    """Train from the global ``arrays`` in round ``number`` (from 1).

    ``receipt`` is the ledger's of an earlier round, as the coordinator shows it.

    Raises:
        BudgetExhausted: the ledger does not cover the round; nothing was trained.
        LedgerDistrusted: the ledger was changed or put back; nothing was trained.
        FedNeuroError: the loss is not finite.
    """
    started = time.monotonic()
    session.load(arrays)
    study = session.study
    optimizer = optimizer_for(session, number)
    session.network.train()
    with torch.random.fork_rng(devices=_cuda(session)):
        torch.manual_seed(int(stream(study, session.settings.name, number, "dropout").integers(2**63)))
        if study.privacy.mode == "none":
            steps, loss = _plain_steps(session, number, optimizer)
            charge = sigma = None
        else:
            steps, loss = study.training.local_steps, None
            charge, sigma = private_steps(session, number, optimizer, receipt)
    keep_optimizer(session, number, optimizer)
    return TrainReply(
        site=session.settings.name,
        round=number,
        arrays=to_arrays(session.network),
        steps=steps,
        seconds=time.monotonic() - started,
        loss=loss,
        epsilon=charge.epsilon_after if charge else None,
        noise_multiplier=sigma,
        attempt=charge.attempt if charge else None,
        receipt=charge.receipt if charge else None,
    )


def autocast(session: Session) -> torch.autocast:
    """The study's arithmetic for forward and backward."""
    enabled = session.study.training.precision == "bfloat16"
    return torch.autocast(session.device.type, dtype=torch.bfloat16, enabled=enabled)


def _plain_steps(session: Session, number: int, optimizer: torch.optim.Optimizer) -> tuple[int, float]:
    """Run the round's steps; returns their number and the mean loss."""
    training, crops = session.study.training, session.crops
    assert crops is not None  # noqa: S101 - the gate let no held-out site come here
    rng = stream(session.study, session.settings.name, number, "batches")
    if training.local_steps:
        count = training.local_steps
        batches = (crops.batch(training.batch_size, rng) for _ in range(count))
    else:
        per_epoch = math.ceil(len(session.trained) / training.batch_size)
        count = training.local_epochs * per_epoch
        batches = (batch for _ in range(training.local_epochs) for batch in crops.epoch(training.batch_size, rng))
    total_loss = torch.zeros((), device=session.device)
    for index, (images, labels) in enumerate(batches):
        set_learning_rate(session, optimizer, (number - 1) * count + index, training.rounds * count)
        optimizer.zero_grad(set_to_none=True)
        with autocast(session):
            logits = session.network(images.to(session.device))
        loss = session.loss(logits.float(), labels.to(session.device))
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        total_loss += loss.detach().float()
    mean = float(total_loss) / count
    if not math.isfinite(mean):
        raise FedNeuroError(
            f"site {session.settings.name}: the training loss of round {number} is not finite; "
            "lower training.learning_rate or look for a faulty scan",
            reason=Reason.NON_FINITE,
        )
    return count, mean


def _cuda(session: Session) -> list[torch.device]:
    return [session.device] if session.device.type == "cuda" else []

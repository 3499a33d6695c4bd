# SPDX-License-Identifier: Apache-2.0
"""Local training between two rounds, plain or under patient-level differential privacy.

Both paths share the network, the crops, the optimiser and the learning-rate schedule; they differ in how a
step's gradient is made. Plain: the mean loss over a batch of crops. Private: see
:mod:`fedneuro.privacy.dpsgd`; the budget is reserved in the ledger, on disk, before the first step. What a strategy
does at the site is in :mod:`.methods`; ditto's personal model is trained here, after the global one.
"""

import math
import time
from collections.abc import Callable

import torch

from ..models.optimizers import build_optimizer, optimizer_arrays, restore_optimizer
from ..models.state import load_arrays, to_arrays
from ..privacy.contract import Arrays, Receipt, TrainReply
from ..privacy.errors import FedNeuroError, Reason
from .data.ahead import ahead
from .methods import LocalRound, Pull, personal_state
from .optimizers import keep_optimizer, optimizer_for, set_learning_rate
from .private_training import private_steps
from .session import Session, stream

__all__ = ["train"]


def train(session: Session, number: int, arrays: Arrays, receipt: Receipt | None = None) -> TrainReply:
    """Train from what came down, ``arrays``, in round ``number`` (from 1).

    ``receipt`` is the ledger's of an earlier round, as the coordinator shows it.

    Raises:
        BudgetExhausted: the ledger does not cover the round; nothing was trained.
        LedgerDistrusted: the ledger was changed or put back; nothing was trained.
        FedNeuroError: the loss is not finite.
    """
    started = time.monotonic()
    study, local = session.study, LocalRound(session, number, arrays)
    optimizer = optimizer_for(session, number)
    session.network.train()
    with torch.random.fork_rng(devices=_cuda(session)):
        torch.manual_seed(int(stream(study, session.settings.name, number, "dropout").integers(2**63)))
        if study.privacy.mode == "none":
            steps, loss = _plain_steps(session, number, optimizer, local.correct)
            charge = sigma = None
        else:
            steps, loss = study.training.local_steps, None
            charge, sigma = private_steps(session, number, optimizer, receipt, local.correct)
        keep_optimizer(session, number, optimizer)
        outgoing = local.outgoing()
        if study.strategy.name == "ditto":
            _train_personal(session, number, local.model)
    return TrainReply(
        site=session.settings.name,
        round=number,
        arrays=outgoing,
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


def _plain_steps(
    session: Session,
    number: int,
    optimizer: torch.optim.Optimizer,
    correct: Callable[[], None],
    name: str = "batches",
) -> tuple[int, float]:
    """Run the round's steps, with ``correct`` on each gradient; returns their number and the mean loss."""
    training, crops = session.study.training, session.crops
    assert crops is not None  # noqa: S101 - the gate let no held-out site come here
    rng = stream(session.study, session.settings.name, number, name)
    if training.local_steps:
        count = training.local_steps
        batches = (crops.batch(training.batch_size, rng) for _ in range(count))
    else:
        per_epoch = math.ceil(len(session.trained) / training.batch_size)
        count = training.local_epochs * per_epoch
        batches = (batch for _ in range(training.local_epochs) for batch in crops.epoch(training.batch_size, rng))
    total_loss = torch.zeros((), device=session.device)
    for index, (images, labels) in enumerate(ahead(batches)):
        set_learning_rate(session, optimizer, (number - 1) * count + index, training.rounds * count)
        optimizer.zero_grad(set_to_none=True)
        with autocast(session):
            logits = session.network(images.to(session.device))
        loss = session.loss(logits.float(), labels.to(session.device))
        loss.backward()  # type: ignore[no-untyped-call]
        correct()
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


def _train_personal(session: Session, number: int, model: Arrays) -> None:
    """Ditto: as many steps on the site's personal model, pulled towards the global ``model`` of the round's start."""
    training, kept = session.study.training, personal_state(session)
    load_arrays(session.network, model)
    parameters = [p for p in session.network.parameters() if p.requires_grad]
    pull = Pull(parameters, session.study.strategy.proximal)
    optimizer = build_optimizer(
        training.optimizer,
        parameters,
        training.learning_rate,
        momentum=training.momentum,
        weight_decay=training.weight_decay,
    )
    before = kept.before(number)
    memory = {name.removeprefix("optimizer/"): a for name, a in before.items() if name.startswith("optimizer/")}
    if before:
        load_arrays(session.network, {name: before[f"model/{name}"] for name in model})
    if memory and training.optimizer_state == "keep":
        restore_optimizer(optimizer, memory)
    _plain_steps(session, number, optimizer, pull.add, "personal")
    after = {f"model/{name}": array for name, array in to_arrays(session.network).items()}
    kept.save(number, after | {f"optimizer/{name}": array for name, array in optimizer_arrays(optimizer).items()})


def _cuda(session: Session) -> list[torch.device]:
    return [session.device] if session.device.type == "cuda" else []

# SPDX-License-Identifier: Apache-2.0
"""The private steps of a round: reserve, train, settle.

Guarantee: (ε, δ)-differential privacy of what the site sends, against everyone who sees it, the server
included. Unit: the patient. Neighbouring relation: zero-out of one patient. ε composes all private steps that
the ledger holds for this study and data set, over rounds and over retries. The noise multiplier is computed
here, by the hospital, from the study's ε, δ, rate and number of steps; nobody sends it.
"""

from collections.abc import Callable

import torch

from ..models.optimizers import NoisedAdam
from ..privacy.budget import site_delta, training_event
from ..privacy.contract import Receipt
from ..privacy.dpsgd import PatientGradient
from ..privacy.ledger import Ledger, Reservation
from ..privacy.noise import SecureRandom
from .data.ahead import ahead
from .optimizers import set_learning_rate
from .session import Session, stream

__all__ = ["private_steps"]


def private_steps(
    session: Session,
    number: int,
    optimizer: torch.optim.Optimizer,
    receipt: Receipt | None = None,
    correct: Callable[[], None] = lambda: None,
) -> tuple[Reservation, float]:
    """Take the round's private steps.

    Args:
        session: the study at this site.
        number: round, from 1.
        optimizer: steps on the noised gradients.
        receipt: of the ledger after an earlier round, as the coordinator shows it.
        correct: adds a term to each noised gradient that is made of published numbers alone (:mod:`.methods`).

    Returns:
        What was charged, and the noise multiplier.

    Raises:
        BudgetExhausted: the ledger does not cover the round; nothing was trained.
        LedgerDistrusted: the ledger was changed or put back; nothing was trained.
    """
    study, settings, crops = session.study, session.settings, session.crops
    privacy, steps = study.privacy, study.training.local_steps
    assert crops is not None  # noqa: S101 - the gate let no held-out site come here
    event = training_event(study, settings.public_size, steps=steps)
    sigma = event.noise_multiplier
    ledger = Ledger(settings.ledger, settings.name)
    reservation = ledger.reserve(
        study.hash,
        settings.dataset_id,
        number,
        event,
        delta=site_delta(privacy.delta, settings.public_size),
        budget_epsilon=privacy.epsilon,
        lifetime=settings.lifetime,
        receipt=receipt,
    )
    random = SecureRandom()
    gradient = PatientGradient(
        session.network,
        session.loss,
        clip=privacy.clip,
        noise_multiplier=sigma,
        expected_patients=privacy.sample_rate * session.public_training_size,
        random=random,
        path=session.path,
        clipping=privacy.clipping,
    )
    if isinstance(optimizer, NoisedAdam):
        optimizer.noise_std = gradient.noise_std
    left_out = 0
    for step in range(steps):
        position = (number - 1) * steps + step
        set_learning_rate(session, optimizer, position, study.total_steps)
        sampled = [session.trained[i] for i in random.poisson_sample(len(session.trained), privacy.sample_rate)]
        # A stream per patient: one patient's crops do not depend on who else was sampled.
        streams = ((patient, stream(study, settings.name, number, step, patient)) for patient in sampled)
        drawn = (crops.of_patient(patient, privacy.crops_per_patient, rng) for patient, rng in streams)
        for images, labels in ahead(drawn):
            gradient.accumulate(images.to(session.device), labels.to(session.device))
        left_out += gradient.finish().non_finite
        correct()
        optimizer.step()
    if left_out:
        # In the hospital's own log: who counts as zero is nobody else's business.
        session.notes.append(
            f"train round {number}: {left_out} times a patient's gradient was not finite: counted as 0"
        )
    ledger.settle(reservation.id)
    return reservation, sigma

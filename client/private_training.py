# SPDX-License-Identifier: Apache-2.0
"""The private steps of a round: reserve, train, settle.

Guarantee: (ε, δ)-differential privacy of what the site sends, against everyone who sees it, the server
included. Unit: the patient. Neighbouring relation: zero-out of one patient. ε composes all private steps that
the ledger holds for this study and data set, over rounds and over retries. The noise multiplier is computed
here, by the hospital, from the study's ε, δ, rate and number of steps; nobody sends it.
"""

import torch

from ..privacy.accounting import GaussianEvent, calibrate
from ..privacy.dpsgd import PatientGradient
from ..privacy.ledger import Ledger
from ..privacy.noise import SecureRandom
from .optimizers import set_learning_rate
from .session import Session, stream

__all__ = ["private_steps"]


def private_steps(session: Session, number: int, optimizer: torch.optim.Optimizer) -> tuple[float, float]:
    """Take the round's private steps.

    Returns:
        ε spent by this data set in this study so far, and the noise multiplier.

    Raises:
        BudgetExhausted: the ledger does not cover the round; nothing was trained.
    """
    study, settings, crops = session.study, session.settings, session.crops
    privacy, steps = study.privacy, study.training.local_steps
    assert crops is not None  # noqa: S101 - the gate let no held-out site come here
    sigma = calibrate(privacy.epsilon, privacy.delta, privacy.sample_rate, study.total_steps)
    event = GaussianEvent(sample_rate=privacy.sample_rate, noise_multiplier=sigma, count=steps)
    ledger = Ledger(settings.state / "ledger.db")
    reservation = ledger.reserve(
        study.hash, settings.name, number, event, delta=privacy.delta, budget_epsilon=privacy.epsilon
    )
    random = SecureRandom()
    gradient = PatientGradient(
        session.network,
        session.loss,
        clip=privacy.clip,
        noise_multiplier=sigma,
        expected_patients=privacy.sample_rate * session.public_training_size,
        random=random,
        autocast=torch.bfloat16 if study.training.precision == "bfloat16" else None,
    )
    for step in range(steps):
        position = (number - 1) * steps + step
        set_learning_rate(session, optimizer, position, study.total_steps)
        for index in random.poisson_sample(len(session.trained), privacy.sample_rate):
            patient = session.trained[index]
            # A stream per patient: one patient's crops do not depend on who else was sampled.
            rng = stream(study, settings.name, number, step, patient)
            images, labels = crops.of_patient(patient, privacy.crops_per_patient, rng)
            gradient.accumulate(images.to(session.device), labels.to(session.device))
        gradient.finish()
        optimizer.step()
    ledger.settle(reservation.id)
    return reservation.epsilon_after, sigma

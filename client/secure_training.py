# SPDX-License-Identifier: Apache-2.0
"""A site's part of a round in mode ``distributed``: one step's gradient, in whole numbers, noised and masked.

Guarantee: (ε, δ)-differential privacy of the *sum over the hospitals*, which is all that the server can compute,
against a server that looks at everything it gets, up to ``privacy.tolerate`` hospitals that tell it what they
know, and everyone who sees the model. Unit: the patient. Neighbouring relation: zero-out of one patient. The noise
of one hospital alone is smaller by the square root of the number of hospitals; what protects it is the mask.

The steps are those of :mod:`fedneuro.privacy.secagg.participant`. Between two messages the site's part lies in
``aggregation.json`` in the study's folder, readable by the site alone, and is overwritten *before* each answer, so a
site may be restarted or move to another worker, and a step is never taken twice. The ledger is charged before
the first gradient of a round is computed, whether or not the round comes to its end.
"""

import json
import os
import time
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from ..privacy.budget import site_delta, training_event
from ..privacy.contract import KeysReply, MaskedReply, Request, SecureStep, SharesReply, UnmaskReply
from ..privacy.dpsgd import PatientGradient
from ..privacy.errors import ContractViolation, Reason, Refused
from ..privacy.ledger import Ledger
from ..privacy.noise import SecureRandom
from ..privacy.secagg.grid import SHARE, Grid, SiteSum
from ..privacy.secagg.keys import Identity, fingerprint
from ..privacy.secagg.participant import Participant, Terms
from .session import Session, stream
from .settings import SiteSettings

__all__ = ["answer_step", "identity_of"]

_STATE = "aggregation.json"
_PEERS = "peers.json"


def identity_of(settings: SiteSettings) -> Identity:
    """The key by which other hospitals know this site."""
    if settings.identity is not None:
        return Identity.at(settings.identity)
    return Identity.at(settings.state / "identity.key", create=True)


def answer_step(session: Session, request: Request) -> KeysReply | SharesReply | MaskedReply | UnmaskReply:
    """Take one step of a secure aggregation.

    Raises:
        ContractViolation: the step is out of order, or names other sites or keys.
        Refused: fewer hospitals are named than the study's terms allow, or one that this hospital does not know.
        BudgetExhausted: the ledger does not cover the round; nothing was computed.
    """
    step = request.secure
    if step is None:
        raise ContractViolation(f"a {request.kind} request carries no secure step")
    if request.kind == "keys":
        return _keys(session, request.round, step)
    part = _load(session, request.round)
    site = session.settings.name
    if request.kind == "shares":
        _check_peers(session, step)
        sealed = part.share(step.roster, step.adverts)
        _save(session, part)
        return SharesReply(site=site, round=request.round, sealed=sealed)
    if request.kind == "masked":
        part.enter(step.context, step.sealed)
        _save(session, part)
        return _masked(session, request, part)
    seeds, keys = part.unmask(step.context, set(step.survivors))
    advert = None
    if request.round < session.study.training.rounds:
        following = Participant.begin(site, _terms(session, request.round + 1))
        advert = following.advert(identity_of(session.settings))
        _save(session, following)
    else:
        _save(session, part)
    return UnmaskReply(site=site, round=request.round, self_shares=seeds, key_shares=keys, advert=advert)


def _keys(session: Session, number: int, step: SecureStep) -> KeysReply:
    _check_peers(session, step)
    part = Participant.begin(session.settings.name, _terms(session, number))
    _save(session, part)  # forgets what was left of an aggregation that did not end
    advert = part.advert(identity_of(session.settings))
    return KeysReply(site=session.settings.name, round=number, advert=advert)


def _masked(session: Session, request: Request, part: Participant) -> MaskedReply:
    """Reserve, compute, add the noise share, mask; in this order."""
    started = time.monotonic()
    study, settings = session.study, session.settings
    privacy, number = study.privacy, request.round
    if request.arrays is None:
        raise ContractViolation(f"a {request.kind} request of round {number} carries no model")
    session.load(request.arrays)
    event = training_event(study, settings.public_size, steps=1)
    size = sum(p.numel() for p in session.network.parameters() if p.requires_grad)
    grid = Grid(
        clip=privacy.clip,
        noise_multiplier=event.noise_multiplier,
        size=size,
        sites=len(part.roster),
        tolerate=privacy.tolerate,
    )
    grid.prove(releases=study.total_steps, epsilon=privacy.epsilon)
    ledger = Ledger(settings.ledger, settings.name)
    charge = ledger.reserve(
        study.hash,
        settings.dataset_id,
        number,
        event,
        delta=site_delta(privacy.delta, settings.public_size) * (1 - SHARE),
        budget_epsilon=privacy.epsilon,
        lifetime=settings.lifetime,
        receipt=request.receipt,
    )
    vector = _noised_sum(session, number, grid, event.noise_multiplier)
    part.mask(vector)
    ledger.settle(charge.id)
    return MaskedReply(
        site=settings.name,
        round=number,
        vector=vector,
        seconds=time.monotonic() - started,
        epsilon=charge.epsilon_after + SHARE * privacy.epsilon,
        noise_multiplier=event.noise_multiplier,
        attempt=charge.attempt,
        receipt=charge.receipt,
    )


def _noised_sum(session: Session, number: int, grid: Grid, sigma: float) -> NDArray[np.uint64]:
    """The site's sum of whole-number gradients with its share of the noise, to be masked before it leaves."""
    study, settings, crops = session.study, session.settings, session.crops
    assert crops is not None  # noqa: S101 - the gate let no held-out site come here
    random, privacy = SecureRandom(), study.privacy
    total, non_finite = SiteSum(grid), 0
    session.network.train()
    devices = [session.device] if session.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(int(stream(study, settings.name, number, "dropout").integers(2**63)))
        engine = PatientGradient(
            session.network,
            session.loss,
            clip=privacy.clip,
            noise_multiplier=sigma,
            expected_patients=privacy.sample_rate * session.public_training_size,
            random=random,
            path=session.path,
            clipping=privacy.clipping,
        )
        for index in random.poisson_sample(len(session.trained), privacy.sample_rate):
            patient = session.trained[index]
            rng = stream(study, settings.name, number, 0, patient)
            images, labels = crops.of_patient(patient, privacy.crops_per_patient, rng)
            engine.accumulate(images.to(session.device), labels.to(session.device))
            # One patient at a time: each is rounded, and measured, alone.
            total.add(engine.take_sum().cpu().numpy())
            non_finite += engine.report().non_finite
    if left_out := total.left_out + non_finite:
        # In the hospital's own log: who counts as zero is nobody else's business.
        session.notes.append(f"round {number}: {left_out} patients had no usable gradient: counted as zero")
    return total.noised(random)


# -- what is kept between the steps ------------------------------------------------------------------------


def _terms(session: Session, number: int) -> Terms:
    study = session.study
    return Terms(study=study.hash, round=number, tolerate=study.privacy.tolerate, least=study.strategy.min_sites)


def _load(session: Session, number: int) -> Participant:
    path = session.folder / _STATE
    try:
        part = Participant.load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        part = None
    if part is None or part.terms != _terms(session, number) or part.site != session.settings.name:
        raise ContractViolation(
            f"site {session.settings.name} gave no keys for round {number}; the round begins with keys",
            reason=Reason.OUT_OF_STEP,
        )
    return part


def _save(session: Session, part: Participant) -> None:
    _write_private(session.folder / _STATE, part.dump())


def _write_private(path: Path, text: str) -> None:
    """Replace a file that only its owner can read; on disk when this returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _check_peers(session: Session, step: SecureStep) -> None:
    """Refuse a roster that does not know this site, or names a hospital by another key than this one knows.

    Raises:
        ContractViolation: this site is missing, or under another key.
        Refused: a hospital that is not among ``peers``, or one whose key has changed.
    """
    settings, roster = session.settings, step.roster
    if roster.get(settings.name) != identity_of(settings).public:
        raise ContractViolation(f"the roster does not hold site {settings.name} under its own key")
    if heldout := sorted(set(roster) & set(session.study.evaluation.heldout)):
        raise ContractViolation(f"the roster names held-out sites: {', '.join(heldout)}")
    shown = {name: fingerprint(identity) for name, identity in roster.items()}
    if settings.peers is not None:
        known, remedy = (
            dict(settings.peers),
            "compare fingerprints with that hospital, then change [[peer]] in node.toml",
        )
        strangers = [name for name, print_ in shown.items() if known.get(name) != print_]
    else:
        path = session.folder / _PEERS
        known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        remedy = f"compare fingerprints with that hospital, then remove {path}"
        strangers = [name for name, print_ in shown.items() if known.get(name, print_) != print_]
        if not strangers and set(shown) - set(known):
            _write_private(path, json.dumps(known | shown))
    if strangers:
        raise Refused(
            f"site {settings.name}: {', '.join(sorted(strangers))} came with a key that this hospital does not know as "
            f"theirs; {remedy}"
        )

# SPDX-License-Identifier: Apache-2.0
"""A study in plain words, for the person who is asked to approve it: what it does here, what leaves, what it costs."""

import math

import numpy as np

from ..privacy.budget import evaluations, site_delta, training_event
from ..privacy.contract import Role
from ..privacy.released import MIN_CELL
from ..privacy.study import Study
from ..privacy.wire_layout import reply_shapes
from .policy_rules import epsilon_per_round, layout_of
from .settings import SiteSettings

__all__ = ["summary"]

_MODES = {
    "local": "every update carries enough noise to be safe against everyone, the coordinator included",
    "distributed": "updates carry a share of the noise and are only ever seen as a sum over hospitals; several "
    "hospitals and the coordinator together could see more",
    "none": "NO PROMISE to patients: exact updates leave; from them, images of patients can sometimes be rebuilt",
}


def summary(study: Study, site: SiteSettings) -> list[str]:
    """Lines that say what the study would do at this site.

    Raises:
        BadInput: no sensible noise reaches the study's ε.
    """
    trains = site.name not in study.evaluation.heldout
    rounds = study.training.rounds
    size = sum(b for _, _, b in layout_of(study))
    count = sum(n for _, n, _ in layout_of(study))
    lines = [
        f"Study      {study.study.name}: {study.study.description or 'no description'}",
        f"Hash       {study.hash}",
        f"Task       {study.task.kind} of {', '.join(study.task.outputs)} from {', '.join(study.data.modalities)}",
        f"Model      {study.model.name}, {study.model.dims}D, {count:,} parameters",
        f"Here       {'trains on' if trains else 'only judges with'} the scans of data set {site.dataset_id} "
        f"(declared size {site.public_size}), {rounds} rounds",
    ]
    if trains != (site.role is Role.TRAIN):
        lines.append(f"           this node grants role {site.role.value}, so it will refuse")
    lines += _privacy(study, site, trains=trains)
    lines += _leaves(study, site, size, trains=trains)
    lines.append(
        "Stays      scans, masks, tables, values of single patients, pictures, the number of patients, all logs"
    )
    return lines


def _privacy(study: Study, site: SiteSettings, *, trains: bool) -> list[str]:
    privacy = study.privacy
    lines = [f"Privacy    mode {privacy.mode}: {_MODES.get(privacy.mode, 'see the study file')}"]
    if privacy.mode == "none":
        return lines
    delta = site_delta(privacy.delta, site.public_size)
    if trains:
        event = training_event(study, site.public_size)
        lines.append(
            f"Cost       ε {privacy.epsilon:g} over {study.training.rounds} rounds at δ {delta:g}, "
            "per patient who trains "
            f"(one round alone: ε {epsilon_per_round(study, site.public_size):.2g}); noise multiplier "
            f"{event.noise_multiplier:.3g}"
        )
        lines.append(
            f"           whoever sees all that leaves can be at most e^{privacy.epsilon:g} times surer that a patient "
            f"took part (but for a probability of {delta:g})"
        )
    if privacy.metrics == "noise":
        lines.append(
            f"           ε {privacy.metrics_epsilon:g} at δ {delta:g} for the metrics, per patient who is judged"
        )
    return lines


def _leaves(study: Study, site: SiteSettings, size: int, *, trains: bool) -> list[str]:
    rounds, asked = study.training.rounds, evaluations(study)
    lines = ["Leaves     once: role, declared size, software versions"]
    if trains:
        loss = " and its mean training loss" if study.privacy.mode == "none" else ""
        up, what = _reply_bytes(study) or size, "the trained model"
        if up != size:
            what = "what was trained of the model" + (f", as {study.wire.up}" if study.wire.up != "float32" else "")
        lines.append(f"           {rounds} times: {what}{loss}, {_bytes(up)} each, {_bytes(up * rounds)} in all")
    how = "with noise" if study.privacy.metrics == "noise" else "exact, as means over patients"
    least = max(study.evaluation.min_patients, site.min_patients)
    lines.append(
        f"           {asked} times: {', '.join(study.metric_names)} ({how}; nothing from fewer than {least} patients)"
    )
    if strata := study.evaluation.strata:
        lines.append(
            f"           once: {study.metric_names[0]} by {', '.join(strata)} (exact; no group of fewer than "
            f"{max(least, MIN_CELL)} patients, counts rounded to five)"
        )
    return lines


def _reply_bytes(study: Study) -> int:
    """Bytes of the arrays that leave after a round; 0 in mode ``distributed``, whose replies are masked sums."""
    if study.privacy.mode == "distributed":
        return 0
    down = {name: ((numbers,), "float32") for name, numbers, _ in layout_of(study)}
    agreed = reply_shapes(study, down).values()
    return sum(math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in agreed)


def _bytes(count: int) -> str:
    value = float(count)
    for unit in ("bytes", "kB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            break
        value /= 1000
    return f"{value:.3g} {unit}"

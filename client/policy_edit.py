# SPDX-License-Identifier: Apache-2.0
"""Writing ``policy.toml``: the first file with its comments, and approvals that leave every comment in place.

The node itself never writes its policy; only these functions do, for the person who runs ``fedneuro-node init``,
``approve`` or ``revoke-approval``.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import tomlkit
from tomlkit.exceptions import TOMLKitError
from tomlkit.items import Array

from ..privacy.contract import Role
from ..privacy.errors import BadInput
from ..privacy.study_words import toml_value
from .policy import load_policy

__all__ = ["POLICY_TEMPLATE", "approve", "revoke", "write_policy"]

POLICY_TEMPLATE = """\
# What this hospital permits to FedNeuro. It belongs to the hospital; nothing that a coordinator sends can change it.
# Whatever is not granted here is refused. A change takes effect at the next message; no restart is needed.
# See which rule decides about a study:   fedneuro-node policy explain STUDY --config node.toml
# Every key is explained in docs/policy.md. Units: ε and δ per patient; hours; bytes.

[studies]
approved = []                    # written by: fedneuro-node approve STUDY --config node.toml

# Studies that need no approval of their own, because a coordinator signed them and they fit (all of it must be true):
# [[studies.rules]]
# coordinator = "…"              # Ed25519 public key of the coordinator, 64 hexadecimal digits
# tasks = ["segmentation"]
# datasets = [{dataset}]
# modes = ["local"]

[grant]
roles = [{role}]               # "train": the hospital's scans train; "heldout": they only judge
datasets = [{dataset}]         # data sets by their name in the privacy ledger

[privacy]                        # the least that every patient is promised
modes = {modes}
max_epsilon_round = {epsilon_round}
max_epsilon_study = {epsilon_study}
max_epsilon_dataset = {epsilon_dataset}       # over all studies, for ever; the privacy ledger counts
max_delta = {delta}
min_noise_multiplier = 0.3       # noise over the bound on one patient's contribution
min_cohort = 5                   # declared size of the data set

[model]
names = ["unet", "resnet"]
max_parameters = 50_000_000
max_bytes = 200_000_000          # of one model, as it travels

[reply]                          # what may leave besides a refusal
arrays = ["*"]                   # patterns of the names of a trained model's arrays
metrics = [                      # means over patients
    "dice", "nsd", "hd95", "volume_difference",
    "lesion_f1", "lesion_sensitivity", "false_positives", "lesion_count_difference", "lesion_dice", "lesion_hd95",
    "accuracy", "auroc", "auprc", "sensitivity", "specificity", "brier", "ece", "reliability",
]
exact_metrics = true             # false: only metrics that carry noise (privacy.metrics = "noise" in the study)
strata = false                   # true: the first metric also by age, sex, scanner and lesion size, from 5 patients on
statistics = false               # true: of the data set, as a file that staff make (fedneuro-node data stats --release)
training_loss = false            # of a study without privacy; never leaves a private one

[limits]
max_rounds = 200
max_retries = 3                  # of the last round, for a coordinator that crashed; each is charged again
max_hours = 168.0                # of computing, per study
max_requests_per_hour = 1000
gpu_memory_fraction = 1.0        # share of a GPU's memory that the node may take

[[windows]]                      # when it may compute, in local time; repeat the section for more
days = ["mon", "tue", "wed", "thu", "fri", "sat", "sun"]
from = "00:00"
to = "24:00"
"""
"""Filled in by :func:`write_policy`."""


def write_policy(
    path: Path,
    *,
    role: Role,
    dataset: str,
    modes: Sequence[str] = ("local", "distributed"),
    max_epsilon_round: float = 8.0,
    max_epsilon_study: float = 8.0,
    max_epsilon_dataset: float = 10.0,
    max_delta: float = 1e-2,
) -> None:
    """Write a first policy with its comments, readable and writable by its owner alone. It approves no study.

    Args:
        path: of the new file.
        role: what the hospital grants.
        dataset: the data set's name in the privacy ledger.
        modes: privacy modes that are permitted.
        max_epsilon_round: ε of one round, per patient.
        max_epsilon_study: ε of one study.
        max_epsilon_dataset: ε of all studies on the data set.
        max_delta: δ of a study.

    Raises:
        BadInput: there is a file already, or a value is out of range.
    """
    text = POLICY_TEMPLATE.format(
        role=toml_value(role.value),
        dataset=toml_value(dataset),
        modes=toml_value(list(modes)),
        epsilon_round=float(max_epsilon_round),
        epsilon_study=float(max_epsilon_study),
        epsilon_dataset=float(max_epsilon_dataset),
        delta=float(max_delta),
    )
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError as error:
        raise BadInput(f"{path}: there is a policy already; edit it, or move it away") from error
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
    try:
        load_policy(path)
    except BadInput:
        path.unlink()
        raise


def approve(path: Path, study_hash: str) -> bool:
    """Add a study's hash to the policy; every comment stays. False if it is there already.

    Raises:
        BadInput: the policy is not valid.
    """
    return _change(path, study_hash, add=True)


def revoke(path: Path, study_hash: str) -> bool:
    """Take a study's hash out of the policy. False if it is not there.

    Raises:
        BadInput: the policy is not valid.
    """
    return _change(path, study_hash, add=False)


def _change(path: Path, study_hash: str, *, add: bool) -> bool:
    if (study_hash in load_policy(path).studies.approved) is add:
        return False
    try:
        document = tomlkit.parse(path.read_text(encoding="utf-8"))
    except TOMLKitError as error:
        raise BadInput(f"{path}: is not TOML: {error}") from error
    studies = document.setdefault("studies", tomlkit.table())
    approved = studies.setdefault("approved", tomlkit.array())
    if not isinstance(approved, Array):
        raise BadInput(f"{path}: studies.approved is not a list")
    if add:
        approved.append(study_hash)
    else:
        while study_hash in approved:
            approved.remove(study_hash)
    approved.multiline(len(approved) > 1)
    mode = path.stat().st_mode & 0o777
    temporary = path.with_name(f".{path.name}.new")
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "w", encoding="utf-8") as file:
        file.write(tomlkit.dumps(document))
        file.flush()
        os.fsync(file.fileno())
    temporary.chmod(mode)
    try:
        load_policy(temporary)
    except BadInput:
        temporary.unlink()
        raise
    temporary.replace(path)
    return True

# SPDX-License-Identifier: Apache-2.0
"""``fedneuro-node init``: a folder with ``node.toml``, ``policy.toml`` and the runner's secret.

The files say in their comments what every line does. They permit nothing yet: no study is approved, and the node is
in no consortium until ``enrol`` adds its keys and the coordinator's address.
"""

import os
import secrets
from dataclasses import dataclass
from pathlib import Path

from ..privacy.contract import Role
from ..privacy.errors import BadInput
from ..privacy.identity import write_private
from ..privacy.study_words import toml_value
from .policy_edit import write_policy
from .toml_file import Part, parse_toml, validate

__all__ = ["Answers", "init_node"]

_NODE = """\
# FedNeuro: what this hospital decides about its node. Nothing in it can be changed from outside.
# Paths are relative to this file. After a change: fedneuro-node stop, then start. Check with: fedneuro-node doctor

[site]
name = {name}                    # the name in your invitation
role = {role}                    # "train", or "heldout": judges the model, never trains it
public_size = {public_size}      # patients, rounded, as you want it to be known; the only size that is ever told
data = {data}                    # BIDS folder; only read
state = {state}                  # privacy ledger, audit log, logs; never leaves, must be backed up
{cache}

[study]
policy = "policy.toml"           # which studies may run here, and on what terms

[budget]                         # of the data set's life, over all studies
dataset = {dataset}              # its name in the privacy ledger
epsilon = {epsilon}              # what all studies together may spend
min_patients = 5                 # fewer evaluated patients than this return no metric

[runner]
port = {port}                    # on 127.0.0.1 only, between two processes of the node
secret = "runner.secret"         # shared by the two, mode 0600
require_record = {record}        # true: serve only where every installed file is the one that was installed

[sandbox]                        # of the process that trains
isolation = "auto"               # "required": refuse to train without its walls; "off"
memory_gib = 0.0                 # resident memory; 0: nine tenths of the machine's
request_hours = 24.0             # of work on one request
yield_gpu = false                # true: hold while another process uses the GPU

# [superlink], [coordinator] and runner.bundle are written by: fedneuro-node enrol INVITATION
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """What the wizard asks.

    Args:
        name: the site's id.
        role: what the hospital grants.
        public_size: declared, rounded cohort size, from 1.
        data: BIDS folder; it must exist.
        state: folder of ledger and logs, relative to the node's folder or absolute.
        cache: folder of preprocessed scans; None: below ``state``.
        dataset: name in the privacy ledger; empty: the site's.
        epsilon: what all studies together may spend on the data set.
        port: on 127.0.0.1, between SuperNode and runner.
        require_record: refuse an installation that cannot be proven.
    """

    name: str
    role: Role
    public_size: int
    data: Path
    state: str = "state"
    cache: str | None = None
    dataset: str = ""
    epsilon: float = 10.0
    port: int = 9094
    require_record: bool = False


def init_node(folder: Path, answers: Answers, *, force: bool = False) -> list[Path]:
    """Write the files; returns their paths.

    Args:
        folder: of the node; made with mode 0700.
        answers: what goes in.
        force: replace ``node.toml`` and ``policy.toml``; keys and the state are never touched.

    Raises:
        BadInput: a file is there already, the data folder is not, or a value is out of range.
    """
    node, policy, secret = (folder / name for name in ("node.toml", "policy.toml", "runner.secret"))
    if there := [path for path in (node, policy) if path.exists()]:
        if not force:
            raise BadInput(f"{there[0]}: is there already; --force replaces it")
        for path in there:
            path.replace(path.with_name(f"{path.name}.before"))
    data = answers.data.expanduser().resolve()
    if not data.is_dir():
        raise BadInput(f"{answers.data}: there is no such folder; give the BIDS folder of the data set")
    text = _NODE.format(
        name=toml_value(answers.name),
        role=toml_value(answers.role.value),
        public_size=answers.public_size,
        data=toml_value(str(data)),
        state=toml_value(answers.state),
        cache=(
            f"cache = {toml_value(answers.cache)}"
            if answers.cache
            else '# cache = "cache"                # preprocessed scans (default: below state)'
        ),
        dataset=toml_value(answers.dataset or answers.name),
        epsilon=float(answers.epsilon),
        port=answers.port,
        record=str(answers.require_record).lower(),
    )
    _check(text, node)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    state = folder / Path(answers.state).expanduser()
    state.mkdir(parents=True, exist_ok=True, mode=0o700)
    write_policy(
        policy,
        role=answers.role,
        dataset=answers.dataset or answers.name,
        max_epsilon_dataset=answers.epsilon,
        max_epsilon_study=min(8.0, answers.epsilon),
        max_epsilon_round=min(8.0, answers.epsilon),
    )
    descriptor = os.open(node, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
    if not secret.exists():
        write_private(secret, secrets.token_hex(32).encode())
    return [node, policy, secret]


def _check(text: str, path: Path) -> None:
    """The sections that are there must be valid; those of enrol are not there yet.

    Raises:
        BadInput: a value is out of range.
    """
    from pydantic import create_model

    from .node_settings import BudgetPart, RunnerPart, SandboxPart, SitePart, StudyPart

    values = parse_toml(text.encode(), path)
    values["runner"]["bundle"] = "0" * 64
    model = create_model(
        "FirstSettings",
        __base__=Part,
        site=(SitePart, ...),
        study=(StudyPart, ...),
        budget=(BudgetPart, ...),
        runner=(RunnerPart, ...),
        sandbox=(SandboxPart, ...),
    )
    validate(model, values, path)

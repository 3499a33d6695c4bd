# SPDX-License-Identifier: Apache-2.0
"""A hospital with a policy, for tests: its data, its node's key, its files, and a coordinator that asks it."""

import json
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import tomlkit
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from fedneuro.client.policy_edit import write_policy
from fedneuro.client.settings import SiteSettings
from fedneuro.client.site import Site
from fedneuro.privacy.contract import Arrays, Refusal, Reply, Request, Role
from fedneuro.privacy.errors import Reason
from fedneuro.privacy.study import Study
from fedneuro.server.rounds import initial_arrays
from tests.bids import make_study, write_site

__all__ = ["Hospital", "private_study"]


def private_study(**sections: Any) -> Study:
    """A small private study of two rounds; sections are merged key by key."""
    sections["training"] = {"local_steps": 1, "local_epochs": 0, **sections.get("training", {})}
    sections["privacy"] = {
        "mode": "local", "epsilon": 2.0, "delta": 1e-2, "sample_rate": 0.5, "crops_per_patient": 2,
        **sections.get("privacy", {}),
    }  # fmt: skip
    sections["evaluation"] = {"bootstrap": 100, "previews": 0, **sections.get("evaluation", {})}
    return make_study(**sections)


class Hospital:
    """Hospital "north" below ``folder``: ten patients declared, six there; its policy permits private studies."""

    def __init__(self, folder: Path, *, role: Role = Role.TRAIN) -> None:
        self.folder = folder
        write_site(folder / "bids", patients=6, shape=(18, 18, 4))
        self.policy = folder / "policy.toml"
        self.key = folder / "node.key"
        key = ec.generate_private_key(ec.SECP384R1())
        self.key.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
        self.key.chmod(0o600)
        self.public_key = folder / "node.pub.pem"
        self.public_key.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
        write_policy(self.policy, role=role, dataset="north", max_delta=1e-2)
        self.settings = SiteSettings(
            name="north", data=folder / "bids", state=folder / "state", role=role, public_size=10, identity=self.key,
            policy=self.policy,
        )  # fmt: skip
        self.site = Site(self.settings)

    def restart(self, **changes: Any) -> None:
        """Another process of the same node."""
        self.settings = replace(self.settings, **changes)
        self.site = Site(self.settings)

    def edit(self, section: str, **keys: Any) -> None:
        """The hospital changes its policy."""
        document = tomlkit.parse(self.policy.read_text())
        for key, value in keys.items():
            document[section][key] = value
        self.policy.write_text(tomlkit.dumps(document))

    def approve(self, *studies: Study) -> None:
        """The hospital approves studies."""
        self.edit("studies", approved=[study.hash for study in studies])

    def ask(
        self, study: Study, kind: str = "train", number: int = 1, arrays: Arrays | None = None, **more: Any
    ) -> Reply:
        """What the site answers to one request; the untrained model by default."""
        if arrays is None and kind != "hello":
            arrays = initial_arrays(study)["model"]
        number = 0 if kind == "hello" else number
        return self.site.handle(Request(kind=kind, study=study, round=number, arrays=arrays, **more))  # type: ignore[arg-type]

    def refused(self, reply: Reply) -> Reason:
        """The reason code of ``reply``, which must be all that leaves."""
        assert isinstance(reply, Refusal), reply
        return reply.reason

    @property
    def log(self) -> list[dict[str, Any]]:
        """The entries of the audit log, as they stand in the file."""
        return [json.loads(line) for line in self.settings.audit.read_text().splitlines()]

    def logged(self, **fields: Any) -> list[dict[str, Any]]:
        """The entries that hold these fields."""
        return [entry for entry in self.log if all(entry.get(key) == value for key, value in fields.items())]

    @property
    def values(self) -> dict[str, Any]:
        """The policy file's values."""
        return tomllib.loads(self.policy.read_text())

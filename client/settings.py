# SPDX-License-Identifier: Apache-2.0
"""What a hospital set up: the settings of one data set at one node."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

from pydantic import TypeAdapter

from ..privacy.budget import Budget
from ..privacy.contract import Role

__all__ = ["SiteSettings", "read_settings", "settings_text"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteSettings:
    """What a hospital set up for one data set.

    Args:
        name: the site's id.
        data: its BIDS folder; only read.
        state: folder of the ledger, optimiser states, log and local pictures; private to the site.
        role: what the hospital grants.
        public_size: declared, rounded cohort size; the only size that leaves. At least 1.
        cache: folder of preprocessed scans; None: ``state/cache``.
        cache_bytes: that it may take on disk.
        approved: study hashes that the hospital approved; None on a researcher's own machine, where the
            person who starts the study owns the data.
        dataset: identity of the data set in the privacy ledger: every study on these patients names the same; empty:
            the site's id.
        lifetime: what all studies together may spend on the data set; None: each study's own budget only.
        identity: private key by which other hospitals know this one (mode ``distributed``), P-384 in OpenSSH form;
            None: one in the state folder, made when it is first needed.
        peers: name and key fingerprint of every hospital that may take part in a secure aggregation; None: each
            hospital's key is remembered when it is first seen in a study.
        min_patients: fewer evaluated patients than this return no metric, whatever the study allows. At least 1.
        policy: the hospital's ``policy.toml``; None: the list ``approved`` decides, or, without one, everything goes.
        gpu_memory_fraction: share of the GPU's memory that the node may take, in (0, 1].
    """

    name: str
    data: Path
    state: Path
    role: Role
    public_size: int
    cache: Path | None = None
    cache_bytes: int = 64 * 2**30
    approved: frozenset[str] | None = None
    dataset: str = ""
    lifetime: Budget | None = None
    min_patients: int = 1
    policy: Path | None = None
    gpu_memory_fraction: float = 1.0
    identity: Path | None = None
    peers: frozenset[tuple[str, str]] | None = None

    @property
    def ledger(self) -> Path:
        """File of the privacy ledger."""
        return self.state / "ledger.db"

    @property
    def audit(self) -> Path:
        """File of the audit log; ``identity`` signs it."""
        return self.state / "audit.jsonl"

    @property
    def dataset_id(self) -> str:
        """Identity of the data set in the ledger."""
        return self.dataset or self.name


def settings_text(settings: SiteSettings) -> str:
    """Settings as JSON, for the process that trains."""
    return _adapter().dump_json(settings).decode()


def read_settings(text: str) -> SiteSettings:
    """What :func:`settings_text` wrote."""
    return _adapter().validate_json(text)


@cache
def _adapter() -> TypeAdapter[SiteSettings]:
    return TypeAdapter(SiteSettings)

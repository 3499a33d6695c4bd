# SPDX-License-Identifier: Apache-2.0
"""What a hospital set up: the settings of one data set at one node."""

from dataclasses import dataclass
from pathlib import Path

from ..privacy.contract import Role

__all__ = ["SiteSettings"]


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
        approved: study hashes that the hospital approved; None on a researcher's own machine, where the
            person who starts the study owns the data.
    """

    name: str
    data: Path
    state: Path
    role: Role
    public_size: int
    cache: Path | None = None
    approved: frozenset[str] | None = None

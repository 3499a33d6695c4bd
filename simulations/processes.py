# SPDX-License-Identifier: Apache-2.0
"""Child processes of a rehearsal: :mod:`fedneuro.privacy.processes`, which the coordinator's ``start`` uses too."""

from ..privacy.processes import Processes, claim_port, ending

__all__ = ["Processes", "claim_port", "ending"]

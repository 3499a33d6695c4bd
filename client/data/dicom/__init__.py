# SPDX-License-Identifier: Apache-2.0
"""A PACS export becomes a BIDS folder. Read in this order.

:mod:`.headers` (what is there), :mod:`.series` (what belongs together, what is skipped), :mod:`.geometry` (where it
lies), :mod:`.naming` and :mod:`.mapping` (what it is called), :mod:`.convert` (voxels), :mod:`.regions` (masks),
:mod:`.identity` and :mod:`.sidecar` (what may be carried over), :mod:`.importing` (all of it).
"""

from .importing import Summary, import_dicom

__all__ = ["Summary", "import_dicom"]

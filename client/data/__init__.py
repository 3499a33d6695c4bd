# SPDX-License-Identifier: Apache-2.0
"""One hospital's data: a BIDS folder in, checked tensors and training crops out. Nothing here crosses the wall.

``open_site`` → ``SiteData`` (patients, sides, scans) → ``Crops`` (training). Read in that order: :mod:`.bids`,
:mod:`.nifti`, :mod:`.checks`, :mod:`.preprocess`, :mod:`.cache`, :mod:`.opening`, :mod:`.dataset`, :mod:`.split`,
:mod:`.crops`, :mod:`.augment`.
"""

from .crops import Crops
from .dataset import Scan, SiteData
from .opening import open_site
from .split import public_size, side_of

__all__ = ["Crops", "Scan", "SiteData", "open_site", "public_size", "side_of"]

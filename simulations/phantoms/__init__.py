# SPDX-License-Identifier: Apache-2.0
"""Phantoms: synthetic hospitals whose patients look like brain MRI, for demonstrations and tests.

No scan of a person is in them: every head is a random deformation of the ICBM152 average tissue maps that
nilearn carries, seen by the scanner of an invented hospital, with invented lesions that are known exactly.

- :mod:`.anatomy`: a deformed head as tissue fractions on a voxel grid;
- :mod:`.style`: how a hospital's scanner sees: contrast, bias field, noise, voxels, storage;
- :mod:`.scan`: lesions, and tissue fractions turned into grey values;
- :mod:`.write`: patients, sites and federations as BIDS folders;
- :mod:`.outcomes`: a score and a survival time that depend on the lesions, for those who ask;
- :mod:`.lesions`, :mod:`.face`, :mod:`.variety`: for pre-training, many kinds of lesions, what surrounds a brain, and
  crops with another scanner each.
"""

from .style import SiteStyle, style_of
from .write import write_federation, write_site

__all__ = ["SiteStyle", "style_of", "write_federation", "write_site"]

# SPDX-License-Identifier: Apache-2.0
"""``data check``: faults of a data set, found on the first day, at the hospital, in words that its staff understand.

:mod:`.catalogue` (what can be found), :mod:`.files`, :mod:`.headers`, :mod:`.identity`, :mod:`.look` and
:mod:`.metrics` (one file), :mod:`.pairing` (one scan), :mod:`.orientation`, :mod:`.cohort`, :mod:`.mask_cohort` and
:mod:`.duplicates` (all patients), :mod:`.checking` (all of it), :mod:`.pictures` and :mod:`.page` (the report).
"""

from .checking import Report, check_data

__all__ = ["Report", "check_data"]

# SPDX-License-Identifier: Apache-2.0
"""Which patients train and which validate, and how many a hospital says it has.

A patient's side depends on the patient's id and the study's ``data.split_key`` alone: HMAC-SHA256 of the id
gives a number in [0, 1), and the numbers below ``evaluation.validation_fraction`` validate. So all scans of a
patient are on one side, adding a patient moves no other, every engine agrees, and a larger fraction only
moves patients from training to validation. The price: the share is met on average, not exactly, which
shows in small hospitals.
"""

import hashlib
import hmac
from typing import Literal

__all__ = ["keyed_fraction", "public_size", "side_of"]

PUBLIC_STEP = 5
"""Public sizes are multiples of this many patients."""


def keyed_fraction(patient: str, key: str, purpose: str) -> float:
    """A number in [0, 1), uniform over ids, that only ``patient``, ``key`` and ``purpose`` decide.

    Different purposes give independent numbers, so that cutting one data set into simulated sites does not
    also decide who validates there.
    """
    digest = hmac.new(key.encode(), f"{purpose}:{patient}".encode(), hashlib.sha256).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53  # 53 bits: every value is exact in a float


def side_of(patient: str, key: str, validation_fraction: float) -> Literal["train", "validation"]:
    """Side of one patient.

    Args:
        patient: BIDS id, such as ``"sub-CS4941"``.
        key: ``data.split_key`` of the study.
        validation_fraction: share of patients that validate, 0 (none) to 1 (all).
    """
    return "validation" if keyed_fraction(patient, key, "side") < validation_fraction else "train"


def public_size(patients: int) -> int:
    """Cohort size that a simulated hospital declares: rounded to the nearest 5, and at least 5.

    Example:
        >>> [public_size(n) for n in (1, 7, 8, 34)]
        [5, 5, 10, 35]
    """
    return max(PUBLIC_STEP, (patients + PUBLIC_STEP // 2) // PUBLIC_STEP * PUBLIC_STEP)

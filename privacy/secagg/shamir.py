# SPDX-License-Identifier: Apache-2.0
"""Shamir's t-of-n sharing of 32-byte secrets, over the prime field of order 2^256 + 297.

Any t shares give the secret; t - 1 shares are uniform and say nothing about it, whatever the computing power.

Reference: Shamir, "How to share a secret", Communications of the ACM 22(11), 1979.
"""

import secrets
from collections.abc import Mapping, Sequence

__all__ = ["PRIME", "SECRET_BYTES", "SHARE_BYTES", "combine", "share", "weights_at_zero"]

PRIME = 2**256 + 297
"""The smallest prime above 2^256, so every 32-byte secret is an element of the field."""
SECRET_BYTES = 32
SHARE_BYTES = 33


def share(secret: bytes, threshold: int, points: Sequence[int]) -> list[bytes]:
    """Shares of ``secret`` at ``points``, in their order; any ``threshold`` of them give it back.

    Args:
        secret: 32 bytes.
        threshold: t, from 1 to the number of points.
        points: distinct numbers from 1.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> parts = share(bytes(31) + b"x", 2, [1, 2, 3])
        >>> combine({3: parts[2], 1: parts[0]})[-1:]
        b'x'
    """
    if len(secret) != SECRET_BYTES or not 1 <= threshold <= len(points):
        raise ValueError(f"a secret of {len(secret)} bytes, {threshold} of {len(points)}: expected 32 bytes, 1 to n")
    if len(set(points)) != len(points) or not all(0 < point < PRIME for point in points):
        raise ValueError("points must be distinct and at least 1: the share at 0 is the secret itself")
    coefficients = [int.from_bytes(secret, "big"), *(secrets.randbelow(PRIME) for _ in range(threshold - 1))]
    values = []
    for point in points:
        value = 0
        for coefficient in reversed(coefficients):
            value = (value * point + coefficient) % PRIME
        values.append(value.to_bytes(SHARE_BYTES, "big"))
    return values


def weights_at_zero(points: Sequence[int]) -> list[int]:
    """Lagrange weights with which values at ``points`` give the value at 0."""
    weights = []
    for mine in points:
        above = below = 1
        for other in points:
            if other != mine:
                above, below = above * other % PRIME, below * (other - mine) % PRIME
        weights.append(above * pow(below, -1, PRIME) % PRIME)
    return weights


def combine(shares: Mapping[int, bytes]) -> bytes:
    """The secret from shares by point; give at least as many as the threshold was.

    Raises:
        ValueError: a share is malformed, or the shares are not of one 32-byte secret.
    """
    if not shares or any(len(value) != SHARE_BYTES for value in shares.values()):
        raise ValueError(f"a share has {SHARE_BYTES} bytes, and there must be one")
    points = list(shares)
    numbers = [int.from_bytes(shares[point], "big") for point in points]
    value = sum(w * y for w, y in zip(weights_at_zero(points), numbers, strict=True)) % PRIME
    if value >> 256:
        raise ValueError("the shares do not belong to one secret of 32 bytes")
    return value.to_bytes(SECRET_BYTES, "big")

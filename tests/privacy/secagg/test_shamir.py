# SPDX-License-Identifier: Apache-2.0
"""Shamir's sharing: enough shares give the secret, one fewer gives nothing."""

import secrets

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedneuro.privacy.secagg.shamir import PRIME, combine, share, weights_at_zero


@settings(max_examples=60)
@given(st.binary(min_size=32, max_size=32), st.integers(1, 12), st.data())
def test_any_threshold_of_shares_give_the_secret(secret: bytes, threshold: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(threshold, 12))
    points = data.draw(st.permutations(range(1, 30)))[:count]
    shares = dict(zip(points, share(secret, threshold, points), strict=True))
    chosen = data.draw(st.permutations(points))[: data.draw(st.integers(threshold, count))]
    assert combine({point: shares[point] for point in chosen}) == secret


def test_the_order_of_the_field_is_prime() -> None:
    """Miller-Rabin with 40 random bases; a composite passes with probability below 2^-80."""
    odd, twos = PRIME - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    for _ in range(40):
        x = pow(2 + secrets.randbelow(PRIME - 3), odd, PRIME)
        assert x in (1, PRIME - 1) or any((x := x * x % PRIME) == PRIME - 1 for _ in range(twos - 1))


def test_one_share_too_few_fits_every_secret() -> None:
    """With t - 1 shares, for *any* other secret there is a share of a further point that completes it."""
    shares = share(bytes(32), 3, [1, 2, 3, 4])
    for other in (bytes(32), bytes(31) + b"\x01", b"\xff" * 32):
        a, b, c = weights_at_zero([1, 2, 3])
        rest = (
            int.from_bytes(other, "big") - a * int.from_bytes(shares[0], "big") - b * int.from_bytes(shares[1], "big")
        )
        third = rest * pow(c, -1, PRIME) % PRIME
        assert combine({1: shares[0], 2: shares[1], 3: third.to_bytes(33, "big")}) == other


def test_a_share_is_uniform_whatever_the_secret() -> None:
    """4000 shares of one secret, by four low bits: the 99.99 % bound of chi-square for 15 degrees is 44.3."""
    low = np.array([share(bytes(32), 2, [1, 2])[0][-1] >> 4 for _ in range(4000)])
    counts = np.bincount(low, minlength=16)
    assert ((counts - 250) ** 2 / 250).sum() < 44.3


def test_shares_that_were_changed_are_noticed_or_give_another_secret() -> None:
    shares = share(b"s" * 32, 2, [1, 2])
    changed = bytes([shares[0][0], shares[0][1] ^ 1, *shares[0][2:]])
    try:
        assert combine({1: changed, 2: shares[1]}) != b"s" * 32
    except ValueError as error:
        assert "do not belong to one secret" in str(error)


@pytest.mark.parametrize(
    ("secret", "threshold", "points"),
    [(b"short", 1, [1]), (bytes(32), 0, [1]), (bytes(32), 3, [1, 2]), (bytes(32), 1, [0]), (bytes(32), 2, [1, 1])],
)
def test_arguments_out_of_range(secret: bytes, threshold: int, points: list[int]) -> None:
    with pytest.raises(ValueError, match=r"expected|distinct"):
        share(secret, threshold, points)


@pytest.mark.parametrize("shares", [{}, {1: b"x" * 32}])
def test_malformed_shares(shares: dict[int, bytes]) -> None:
    with pytest.raises(ValueError, match="33 bytes"):
        combine(shares)

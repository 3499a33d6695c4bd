# SPDX-License-Identifier: Apache-2.0
"""Sides of patients: stable, disjoint, of the right size on average, and independent of everything else."""

import hashlib
import hmac
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedneuro.client.data import open_site, public_size, side_of
from fedneuro.client.data.split import keyed_fraction
from tests.bids import make_study, write_site

IDS = st.from_regex(r"sub-[A-Za-z0-9]{1,12}", fullmatch=True)
FRACTIONS = st.floats(0.01, 0.99)


@given(
    patients=st.sets(IDS, max_size=20), newcomers=st.sets(IDS, max_size=20), key=st.text(min_size=1), share=FRACTIONS
)
def test_newcomers_move_nobody_and_nobody_is_on_two_sides(
    patients: set[str], newcomers: set[str], key: str, share: float
) -> None:
    before = {p: side_of(p, key, share) for p in patients}
    after = {p: side_of(p, key, share) for p in patients | newcomers}
    assert all(after[p] == side for p, side in before.items())
    assert set(after.values()) <= {"train", "validation"}


@given(patient=IDS, key=st.text(min_size=1), shares=st.tuples(FRACTIONS, FRACTIONS))
def test_a_larger_fraction_only_moves_patients_to_validation(
    patient: str, key: str, shares: tuple[float, float]
) -> None:
    if side_of(patient, key, min(shares)) == "validation":
        assert side_of(patient, key, max(shares)) == "validation"


def test_the_number_is_the_documented_one() -> None:
    digest = hmac.new(b"fedneuro", b"side:sub-CS4941", hashlib.sha256).digest()
    assert keyed_fraction("sub-CS4941", "fedneuro", "side") == pytest.approx(int.from_bytes(digest[:8], "big") / 2**64)


def test_the_share_is_met_on_average() -> None:
    """Of 4000 ids 800 are expected; the standard deviation is 25, so 5 of them are a fault in the hash, not chance."""
    ids = [f"sub-{i:04d}" for i in range(4000)]
    assert abs(sum(side_of(p, "fedneuro", 0.2) == "validation" for p in ids) - 800) < 5 * 25.3


def test_key_and_purpose_give_independent_sides() -> None:
    """Two independent halvings agree on half of 4000 ids: 2000 ± 5 · 31.6."""
    ids = [f"sub-{i:04d}" for i in range(4000)]
    other_key = sum(side_of(p, "a", 0.5) == side_of(p, "b", 0.5) for p in ids)
    other_purpose = sum((keyed_fraction(p, "a", "side") < 0.5) == (keyed_fraction(p, "a", "site") < 0.5) for p in ids)
    assert abs(other_key - 2000) < 158
    assert abs(other_purpose - 2000) < 158


def test_a_site_has_every_patient_on_one_side_also_with_sessions(tmp_path: Path) -> None:
    root = write_site(tmp_path / "HT", patients=12, sessions=("ses-1", "ses-2"), shape=(8, 8, 3))
    study = make_study(evaluation={"validation_fraction": 0.4})
    small = open_site(root, study)
    assert sorted(small.training() + small.validation()) == list(small.patients)
    assert not set(small.training()) & set(small.validation())
    assert all(len(small.scans(p)) == 2 for p in small.patients)
    write_site(root, patients=16, sessions=("ses-1", "ses-2"), shape=(8, 8, 3))
    large = open_site(root, study)
    assert set(small.training()) <= set(large.training())
    assert set(small.validation()) <= set(large.validation())


@given(st.integers(1, 10_000))
def test_public_size_is_rounded_and_never_small(patients: int) -> None:
    size = public_size(patients)
    assert size % 5 == 0
    assert size >= 5
    assert abs(size - patients) <= 2 or (patients < 3 and size == 5)

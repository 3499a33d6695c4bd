# SPDX-License-Identifier: Apache-2.0
"""The check of a data set: planted faults are found, clean data sets are left in peace."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedneuro.client.data.quality import check_data
from fedneuro.client.data.quality.catalogue import CATALOGUE
from fedneuro.simulations.phantoms import SiteStyle, style_of, write_site
from tests.client.faults import FAULTS, PATIENTS

MISSED = {"left-right flip of image and mask without header"}
"""Planted faults that are not found: at most two."""


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("phantoms") / "clinic"
    style = style_of("clinic", 1, resolution_mm=6.0)
    values: dict[str, Any] = {name: getattr(style, name) for name in SiteStyle.__slots__} | {"missing": 0.0}
    write_site(root, name="clinic", patients=PATIENTS, seed=1, style=SiteStyle(**values))
    return root


@pytest.fixture(scope="module")
def memory() -> dict[tuple[str, ...], Any]:
    """What one check saw of unchanged scans serves the next: they lie at the same place."""
    return {}


def test_clean_phantoms_give_no_finding(clean: Path) -> None:
    report = check_data(clean, pictures=0)
    assert report.findings == [] and report.may_join


@pytest.mark.parametrize("name", FAULTS)
def test_planted_fault_is_found(name: str, clean: Path, memory: dict[tuple[str, ...], Any]) -> None:
    plant, expected = FAULTS[name]
    assert expected <= set(CATALOGUE)
    found = check_planted(plant, clean, memory)
    assert bool(found & expected) is (name not in MISSED), found


def check_planted(plant: Callable[[Path], object], clean: Path, memory: dict[tuple[str, ...], Any]) -> set[str]:
    """Findings with the fault; always at the same place, so that memory knows the untouched scans."""
    root = clean.parent / "planted" / "clinic"
    shutil.rmtree(root.parent, ignore_errors=True)
    shutil.copytree(clean, root)
    plant(root)
    return {finding.check for finding in check_data(root, pictures=0, memory=memory).findings}


def test_at_least_forty_faults_and_hardly_one_missed() -> None:
    assert len(FAULTS) >= 40 and len(MISSED) <= 2 and set(FAULTS) >= MISSED

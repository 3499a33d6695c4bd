# SPDX-License-Identifier: Apache-2.0
"""The cache: hits, misses, damage, a disk that does not take it; and the memory above it."""

import errno
import os
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedneuro.client.data import SiteData, open_site
from fedneuro.client.data.cache import ScanCache, ScanMemory
from fedneuro.client.data.preprocess import Prepared, prepare
from fedneuro.privacy.errors import DataError
from tests.bids import RAS, image_path, make_study, mask_path, write_nifti, write_site


@pytest.fixture
def prepared_count(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the scans that are prepared from files, as it happens."""
    seen: list[str] = []

    def counting(files: Any, study: Any) -> Prepared:
        seen.append(files.name)
        return prepare(files, study)

    monkeypatch.setattr("fedneuro.client.data.opening.prepare", counting)
    return seen


def entries(cache: Path) -> list[Path]:
    return sorted(cache.glob("*/*.safetensors"))


def tensors(site: SiteData) -> list[torch.Tensor]:
    return [t.clone() for p in site.patients for s in site.scans(p) for t in (s.image, s.label)]  # not mapped


def test_a_second_opening_prepares_nothing_and_gives_the_same_bits(tmp_path: Path, prepared_count: list[str]) -> None:
    root, study = write_site(tmp_path / "HT"), make_study()
    cold = open_site(root, study, cache=tmp_path / "cache")
    assert len(prepared_count) == len(entries(tmp_path / "cache")) == 4
    warm = open_site(root, study, cache=tmp_path / "cache")
    assert len(prepared_count) == 4
    uncached = open_site(root, study)
    for a, b, c in zip(tensors(cold), tensors(warm), tensors(uncached), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
        assert a.dtype == b.dtype == c.dtype
    assert warm.scans("sub-P001")[0].spacing == cold.scans("sub-P001")[0].spacing == (1.0, 1.0, 1.0)
    assert warm.warnings == cold.warnings


def test_entries_are_named_by_content_and_private(tmp_path: Path) -> None:
    open_site(write_site(tmp_path / "HT"), make_study(), cache=tmp_path / "cache")
    for entry in entries(tmp_path / "cache"):
        assert len(entry.stem) == 64
        assert entry.parent.name == entry.stem[:2]
        assert stat.S_IMODE(entry.stat().st_mode) == 0o400
        assert stat.S_IMODE(entry.parent.stat().st_mode) == 0o700
    assert not list((tmp_path / "cache").glob("*/.new-*"))


def test_the_place_and_the_name_of_the_data_do_not_matter(tmp_path: Path, prepared_count: list[str]) -> None:
    study, root = make_study(), write_site(tmp_path / "HT")
    open_site(root, study, cache=tmp_path / "cache")
    root.rename(tmp_path / "moved")
    open_site(tmp_path / "moved", study, cache=tmp_path / "cache")
    assert len(prepared_count) == 4


@pytest.mark.parametrize(
    "change",
    [{"normalise": "percentile"}, {"spacing": [2.0, 2.0, 2.0]}, {"empty_masks": "keep"}],
    ids=["normalise", "spacing", "empty_masks"],
)
def test_another_setting_is_another_entry(change: dict[str, Any], tmp_path: Path, prepared_count: list[str]) -> None:
    root = write_site(tmp_path / "HT")
    open_site(root, make_study(), cache=tmp_path / "cache")
    open_site(root, make_study(data=change), cache=tmp_path / "cache")
    assert len(prepared_count) == 8


def test_settings_of_training_share_entries(tmp_path: Path, prepared_count: list[str]) -> None:
    root = write_site(tmp_path / "HT")
    open_site(root, make_study(), cache=tmp_path / "cache")
    open_site(root, make_study(data={"patch": [32, 32], "augment": "light"}), cache=tmp_path / "cache")
    assert len(prepared_count) == 4


@pytest.mark.parametrize("which", ["image", "mask"])
def test_a_changed_file_is_prepared_again(which: str, tmp_path: Path, prepared_count: list[str]) -> None:
    root, study = write_site(tmp_path / "HT"), make_study()
    open_site(root, study, cache=tmp_path / "cache")
    if which == "image":
        write_nifti(image_path(root), np.random.default_rng(5).normal(size=(20, 18, 6)).astype(np.float32))
    else:
        write_nifti(mask_path(root), np.ones((20, 18, 6), np.uint8))
    site = open_site(root, study, cache=tmp_path / "cache")
    assert prepared_count[4:] == ["sub-P001"]
    if which == "mask":
        assert site.scans("sub-P001")[0].label.all()


def damage_cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


def damage_empty(path: Path) -> None:
    path.write_bytes(b"")


def damage_one_bit(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-5] ^= 1
    path.write_bytes(bytes(raw))


def damage_spacing(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"[1.0, 1.0, 1.0]", b"[1.0, 1.0, 9.0]"))


@pytest.mark.parametrize("damage", [damage_cut, damage_empty, damage_one_bit, damage_spacing])
@pytest.mark.parametrize("when", ["before-opening", "after-opening"])
def test_damaged_entries_are_made_again(damage: Any, when: str, tmp_path: Path) -> None:
    root, study, cache = write_site(tmp_path / "HT"), make_study(), tmp_path / "cache"
    sound = tensors(open_site(root, study, cache=cache))
    content = {entry: entry.read_bytes() for entry in entries(cache)}
    site = open_site(root, study, cache=cache)
    for entry in entries(cache):
        entry.chmod(0o600)
        damage(entry)
        assert entry.read_bytes() != content[entry]
    if when == "before-opening":
        site = open_site(root, study, cache=cache)
    for a, b in zip(sound, tensors(site), strict=True):
        assert torch.equal(a, b)
    assert [scan.spacing for p in site.patients for scan in site.scans(p)] == [(1.0, 1.0, 1.0)] * 4
    assert all(ScanCache(cache).load(entry.stem) for entry in content)


def test_a_file_that_changes_under_an_open_site_is_noticed(tmp_path: Path) -> None:
    root, study, cache = write_site(tmp_path / "HT"), make_study(), tmp_path / "cache"
    open_site(root, study, cache=cache)
    site = open_site(root, study, cache=cache)
    for entry in entries(cache):
        entry.unlink()
    write_nifti(image_path(root), np.ones((20, 18, 6), np.float32), affine=RAS)
    with pytest.raises(DataError, match=r"HT: sub-P001: a file changed after the data set was opened"):
        site.scans("sub-P001")
    assert site.scans("sub-P002")


def test_a_full_disk_costs_the_cache_but_not_the_study(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The first write fails as on a full disk: one warning, no half-written file, the data come from memory."""
    calls: list[int] = []
    root, study = write_site(tmp_path / "HT"), make_study()
    expected = tensors(open_site(root, study))

    class _File:
        def __init__(self, handle: int) -> None:
            self.handle = handle

        def __enter__(self) -> "_File":
            return self

        def __exit__(self, *_: object) -> None:
            os.close(self.handle)

        def write(self, _: bytes) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    def full_disk(handle: int, *_: Any) -> _File:
        calls.append(handle)
        return _File(handle)

    monkeypatch.setattr("fedneuro.client.data.cache.os.fdopen", full_disk)
    site = open_site(root, study, cache=tmp_path / "cache")
    assert len(calls) == 1
    assert [w for w in site.warnings if "No space left on device" in w and w.startswith("HT: cache ")]
    assert len(caplog.records) == 1
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]
    for a, b in zip(expected, tensors(site), strict=True):
        assert torch.equal(a, b)


def test_a_cache_that_is_a_file_is_told_once(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("")
    site = open_site(write_site(tmp_path / "HT"), make_study(), cache=tmp_path / "cache")
    assert len([w for w in site.warnings if "cannot be written" in w]) == 1
    assert site.scans("sub-P001")


def test_no_folder_no_cache() -> None:
    cache = ScanCache(None)
    assert cache.load("0" * 64) is None
    assert cache.summary("0" * 64) is None
    assert not cache.save("0" * 64, Prepared(torch.zeros(1, 2, 2, 2), None, None, True))
    assert not cache.problem


def test_memory_lets_the_patient_go_that_was_used_longest_ago() -> None:
    def scan() -> tuple[Prepared, ...]:
        return (Prepared(torch.zeros(1, 5, 5, 1), None, None, True),)  # 100 bytes

    memory = ScanMemory(limit=250)
    memory.put("a", scan())
    memory.put("b", scan())
    assert memory.get("a")
    memory.put("c", scan())
    assert memory.get("b") is None
    assert memory.get("a")
    assert memory.held == 200
    memory.put("huge", (Prepared(torch.zeros(1, 50, 5, 1), None, None, True),))
    assert memory.get("huge")
    assert memory.held == 1000

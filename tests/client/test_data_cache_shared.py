# SPDX-License-Identifier: Apache-2.0
"""The cache among processes: built by several, resumed, mapped, kept below its limit, shared by two nodes."""

import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from fedneuro.client.data import build, open_site
from fedneuro.client.data.ahead import ahead
from fedneuro.client.data.cache import ScanCache
from fedneuro.client.data.preprocess import Prepared
from fedneuro.privacy.errors import DataError, EnvironmentProblem
from tests.bids import image_path, make_study, write_site
from tests.sessions import living


def content(cache: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(cache.glob("*/*.safetensors"))}


def same(one: Path, other: Path) -> bool:
    """Two caches hold the same scans; safetensors writes its metadata in any order."""
    names = list(content(one))
    scans = [[ScanCache(folder).load(name.split(".")[0]) for folder in (one, other)] for name in names]
    return names == list(content(other)) and all(
        a is not None and b is not None and a.mask is not None and b.mask is not None
        and torch.equal(a.image, b.image) and torch.equal(a.mask, b.mask) and a.spacing == b.spacing
        for a, b in scans
    )  # fmt: skip


def scan(value: float, side: int = 8) -> Prepared:
    return Prepared(torch.full((1, side, side, side), float(value)), None, (1.0, 1.0, 1.0), True)


def key(number: int) -> str:
    return f"{number:064x}"


def test_several_processes_build_the_same_and_go_on_where_they_were(tmp_path: Path) -> None:
    root, study = write_site(tmp_path / "HT", patients=5), make_study()
    open_site(root, study, cache=tmp_path / "one")
    told: list[tuple[int, int]] = []
    open_site(root, study, cache=tmp_path / "two", workers=2, progress=lambda done, total: told.append((done, total)))
    assert same(tmp_path / "one", tmp_path / "two")
    assert told == [(n, 5) for n in range(1, 6)]
    # Interrupted: two entries are missing, and a third file has a fault. The rest is made, what was there is kept.
    made = sorted((tmp_path / "two").glob("*/*.safetensors"))
    kept = {path: path.stat().st_ino for path in made[2:]}
    for path in made[:2]:
        path.unlink()
    image_path(root, "sub-P003").write_bytes(b"no NIfTI file")
    with pytest.raises(DataError) as caught:
        open_site(root, study, cache=tmp_path / "two", workers=2)
    assert str(caught.value).startswith("HT: sub-P003: sub-P003_FLAIR.nii.gz: cannot be read")
    assert len(str(caught.value).splitlines()) == 1
    assert len(content(tmp_path / "two")) >= 4
    assert {path: path.stat().st_ino for path in kept} == kept


def _stops_half_way(root: Path, cache: Path) -> None:
    os.setsid()
    open_site(root, make_study(), cache=cache, workers=2, progress=lambda *_: time.sleep(60))


def test_a_build_that_is_killed_leaves_no_process(tmp_path: Path) -> None:
    """Workers that wait for work held their memory for ever; the next build goes on with what is there."""
    root, cache = write_site(tmp_path / "HT", patients=5), tmp_path / "cache"
    child = multiprocessing.get_context("fork").Process(target=_stops_half_way, args=(root, cache))
    child.start()
    assert child.pid is not None
    deadline = time.monotonic() + 60
    while len(living(child.pid)) < 3 or not content(cache):
        assert time.monotonic() < deadline and child.is_alive()
        time.sleep(0.05)
    child.kill()
    child.join()
    while living(child.pid):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert len(open_site(root, make_study(), cache=cache).patients) == 5


def _die(_: Any) -> None:
    """Not even loaded: the worker does not know this module, and ends there."""
    os._exit(9)


def test_a_worker_that_dies_is_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, study = write_site(tmp_path / "HT", patients=2), make_study()
    monkeypatch.setattr(build, "_build", _die)
    with pytest.raises(EnvironmentProblem, match=r"sub-P00\d: a process that prepared scans was ended"):
        open_site(root, study, cache=tmp_path / "cache", workers=2)


def test_two_nodes_on_one_cache(tmp_path: Path) -> None:
    root, study = write_site(tmp_path / "HT", patients=12), make_study()
    open_site(root, study, cache=tmp_path / "alone")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fedneuro.client.data.build"])
    nodes = [
        context.Process(target=open_site, args=(root, study), kwargs={"cache": tmp_path / "cache"}) for _ in range(3)
    ]
    for node in nodes:
        node.start()
    for node in nodes:
        node.join(60)
    assert [node.exitcode for node in nodes] == [0, 0, 0]
    assert same(tmp_path / "alone", tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*/.new-*"))


def test_the_limit_takes_what_was_used_longest_ago(tmp_path: Path) -> None:
    size = 8**3 * 4 + 500
    earlier = ScanCache(tmp_path, limit=5 * size)
    for number in range(4):
        assert earlier.save(key(number), scan(number))
    for number in range(4):
        path = earlier.path(key(number))
        assert path is not None
        os.utime(path, (1000 + number, 1000 + number))
    later = ScanCache(tmp_path, limit=5 * size)
    assert later.load(key(0)) is not None  # in use: the oldest no more
    for number in range(10, 13):
        assert later.save(key(number), scan(number))
    left = {int(name.split(".")[0], 16) for name in content(tmp_path)}
    assert {0, 10, 11, 12} <= left and 1 not in left
    assert sum(len(raw) for raw in content(tmp_path).values()) <= 5 * size
    assert not later.problem


def test_a_cache_full_of_the_own_study_is_told_once_and_keeps_what_it_has(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root, study = write_site(tmp_path / "HT", patients=6), make_study()
    open_site(root, study, cache=tmp_path / "all")
    size = len(next(iter(content(tmp_path / "all").values())))
    site = open_site(root, study, cache=tmp_path / "cache", limit=3 * size + 100)
    assert len(content(tmp_path / "cache")) == 3
    assert len([w for w in site.warnings if "is full" in w]) == 1 and len(caplog.records) == 1
    assert all(site.scans(patient)[0].image.any() for patient in site.patients)


def test_what_killed_processes_left_is_removed_after_an_hour(tmp_path: Path) -> None:
    (tmp_path / "ab").mkdir()
    stale, fresh = tmp_path / "ab/.new-1", tmp_path / "ab/.new-2"
    for path, age in ((stale, 4000), (fresh, 10)):
        path.write_bytes(b"half")
        then = time.time() - age
        os.utime(path, (then, then))
    ScanCache(tmp_path).save(key(1), scan(1))
    assert not stale.exists() and fresh.exists()


def test_mapped_scans_are_read_from_the_file_and_never_written_to_it(tmp_path: Path) -> None:
    cache = ScanCache(tmp_path)
    cache.save(key(1), scan(1))
    before = content(tmp_path)
    loaded = cache.load(key(1))
    assert loaded is not None and loaded.mapped
    path = cache.path(key(1))
    assert path is not None and str(path) in Path("/proc/self/maps").read_text()
    loaded.image.add_(1)
    assert content(tmp_path) == before
    path.unlink()  # evicted by another process
    assert float(loaded.image.mean()) == 2
    assert cache.load(key(1)) is None


def test_ahead_keeps_order_and_hands_faults_on() -> None:
    assert list(ahead(range(100), 3)) == list(range(100))

    def broken() -> Any:
        yield 1
        raise ValueError("here")

    items = ahead(broken())
    assert next(items) == 1
    with pytest.raises(ValueError, match="here"):
        next(items)


def test_ahead_stops_with_its_consumer() -> None:
    made: list[int] = []

    def endless() -> Any:
        while True:
            made.append(len(made))
            yield made[-1]

    items = ahead(endless(), 2)
    assert next(items) == 0
    items.close()  # type: ignore[attr-defined]
    count = len(made)
    time.sleep(0.2)
    assert len(made) == count <= 5

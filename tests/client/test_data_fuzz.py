# SPDX-License-Identifier: Apache-2.0
"""Broken files to the readers of scans: a line or a volume, nothing else.

``FEDNEURO_FUZZ_EXAMPLES`` (default 100 per test) makes this longer; ``fedneuro-sim bench fuzz`` runs by the clock, with
limits on memory, and guided by coverage.
"""

import gzip
import multiprocessing
import os
import random
import struct
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from pydicom.dataset import Dataset

from fedneuro.privacy.errors import DataError
from fedneuro.simulations.benchmarks import fuzz
from fedneuro.simulations.benchmarks.fuzz import bench_fuzz
from fedneuro.simulations.benchmarks.fuzz_inputs import _picture, _stored, changed, changed_inside, sound_files
from fedneuro.simulations.benchmarks.fuzz_reader import HANG_SECONDS, READERS, shielded
from tests.sessions import living

EXAMPLES = int(os.environ.get("FEDNEURO_FUZZ_EXAMPLES", "100"))
EVERY_CHECK: Any = list(HealthCheck)
longer = settings(
    max_examples=EXAMPLES, deadline=HANG_SECONDS * 1000, suppress_health_check=EVERY_CHECK, derandomize=True
)
pytestmark = pytest.mark.filterwarnings("ignore")
CORPUS = {reader: sound_files(reader) for reader in READERS}


def read(reader: str, raw: bytes) -> str:
    """``read`` or the line of the refusal; anything else ends the test."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "object")
        path.write_bytes(raw)
        try:
            READERS[reader](path)
        except DataError as error:
            text = str(error)
            assert len(text.splitlines()) == 1 and len(text) < 1000
            return text
    return "read"


@pytest.mark.parametrize("reader", READERS)
def test_sound_files_are_read(reader: str) -> None:
    for raw in CORPUS[reader]:
        assert read(reader, raw) == "read"


@pytest.mark.parametrize("reader", ["nifti", "dicom"])
@given(data=st.data())
@longer
def test_changed_files(reader: str, data: st.DataObject) -> None:
    raw = changed(CORPUS[reader], random.Random(data.draw(st.integers(0, 2**32))))  # noqa: S311
    read(reader, raw)


FIELDS = {"sizeof_hdr": (0, "<i"), "dim": (40, "<8h"), "datatype": (70, "<h"), "bitpix": (72, "<h"),
          "pixdim": (76, "<8f"), "vox_offset": (108, "<f"), "scl_slope": (112, "<f"), "scl_inter": (116, "<f"),
          "xyzt_units": (123, "<B"), "qform_code": (252, "<h"), "sform_code": (254, "<h"), "quatern_b": (256, "<3f"),
          "srow_x": (280, "<12f"), "magic": (344, "<4s"), "extension": (348, "<i")}  # fmt: skip
SHORT = st.integers(-(2**15), 2**15 - 1) | st.sampled_from([0, 1, 3, 4, 7, 8, 16, 64, 128, 512, 1792, 2304])
FLOAT = st.floats(width=32) | st.sampled_from([0.0, 1.0, 352.0, -1.0])
KINDS = {"h": SHORT, "i": st.integers(-(2**31), 2**31 - 1), "f": FLOAT, "B": st.integers(0, 255)}


@st.composite
def headers(draw: st.DrawFn) -> bytes:
    """A NIfTI file some of whose header fields hold anything of their type."""
    raw = bytearray(CORPUS["nifti"][0])
    for name in draw(st.lists(st.sampled_from(sorted(FIELDS)), min_size=1, max_size=4, unique=True)):
        at, form = FIELDS[name]
        values: list[Any] = (
            [draw(st.binary(min_size=4, max_size=4))]
            if form.endswith("s")
            else [draw(KINDS[form[-1]]) for _ in range(int(form[1:-1] or 1))]
        )
        struct.pack_into(form, raw, at, *values)
    return gzip.compress(bytes(raw), 1) if draw(st.booleans()) else bytes(raw)


@given(raw=headers())
@example(raw=CORPUS["nifti"][0][:100])
@example(raw=b"\x1f\x8b")
@example(raw=b"")
@longer
def test_nifti_headers_of_any_content(raw: bytes) -> None:
    read("nifti", raw)


@given(raw=st.binary(max_size=600), dicom=st.booleans())
@longer
def test_bytes_of_any_kind(raw: bytes, dicom: bool) -> None:
    assert read("nifti", raw) != "read"
    assert read("dicom", bytes(128) + b"DICM" + raw if dicom else raw)


def test_a_broken_sequence_is_a_line() -> None:
    """Found by coverage in 300 s: pydicom puts a whole traceback into the message of its OSError."""
    picture = _picture("4")
    picture.ReferencedSeriesSequence = [Dataset()]
    whole = b"\x08\x00\x15\x11SQ\0\0\x08\0\0\0\xfe\xff\x00\xe0\0\0\0\0"  # an empty item, of 8 bytes
    raw = _stored(picture)
    assert raw.count(whole) == 1
    told = read("dicom", raw.replace(whole, whole[:8] + b"\x04\0\0\0" + whole[12:16]))
    assert "damaged DICOM file (With tag" in told and "No tag to read" in told and "Traceback" not in told


def test_a_bomb_is_refused_quickly() -> None:
    """A header that promises what the limits allow, and gzip that unfolds to more than them."""
    raw = bytearray(CORPUS["nifti"][0])
    struct.pack_into("<8h", raw, 40, 3, 512, 512, 512, 1, 1, 1, 1)
    started = time.process_time()
    assert "header promises" in read("nifti", bytes(raw))
    assert "expected at most 1024 MiB" in read(
        "nifti", gzip.compress(bytes(raw), 1) + gzip.compress(bytes(1 << 24)) * 70
    )
    assert time.process_time() - started < HANG_SECONDS


def test_changes_reach_what_is_packed() -> None:
    packed = CORPUS["nifti"][1]
    found = [changed_inside(packed, lambda raw, _: raw + b"end", 1 << 16, seed) for seed in range(20)]
    inside = [raw for raw in found if raw[:2] == b"\x1f\x8b" and not raw.endswith(b"end")]
    assert len(inside) > 10 and all(gzip.decompress(raw).endswith(b"end") for raw in inside)
    assert changed_inside(packed[:50], lambda raw, _: raw[:1], 1 << 16, 1) == b"\x1f"  # what cannot be unpacked
    assert all(changed([packed[:50]], random.Random(seed)) is not None for seed in range(20))  # noqa: S311


def _broken_reader(path: Path) -> None:
    if np.frombuffer(path.read_bytes()[:1].ljust(1), np.uint8)[0] % 2:
        raise RuntimeError("not a line")


def _slow_reader(_: Path) -> None:
    end = time.process_time() + 0.4
    while time.process_time() < end:
        pass


def _greedy_reader(_: Path) -> None:
    try:
        bytearray(1 << 62)
    except MemoryError as error:
        raise DataError("cannot be read") from error


def test_the_clock_counts_the_readers_own_work_and_not_what_is_loaded_before(tmp_path: Path) -> None:
    """On a busy machine the first import took longer than the limit: stopped half-way, it broke every later one."""
    assert shielded(_slow_reader, tmp_path, b"", seconds=0.1).startswith("hang")
    assert shielded(_slow_reader, tmp_path, b"", seconds=0) == "read"
    assert shielded(lambda _: time.sleep(0.3), tmp_path, b"", seconds=0.1) == "read"


def test_a_traceback_and_a_refusal_for_want_of_memory_are_faults(tmp_path: Path) -> None:
    assert shielded(_broken_reader, tmp_path, b"\x01").endswith("RuntimeError: not a line\n")
    assert shielded(_broken_reader, tmp_path, b"\x02") == "read"
    assert shielded(_greedy_reader, tmp_path, b"") == "memory: more asked for than there is"


def test_the_short_run_finds_nothing(tmp_path: Path) -> None:
    found = bench_fuzz(tmp_path / "out.json", seconds=1.0, keep=tmp_path / "keep")
    assert found["faults"] == found["not_repeated"] == [] and found["inputs"] > 50
    assert found["slowest_cpu_s"] > 0 and not (tmp_path / "keep").exists()


def _loaded(work: Path) -> None:
    """As :func:`fedneuro.simulations.benchmarks.fuzz_reader.feed`, once everything is loaded."""
    os.setsid()
    (work / "input").write_bytes(b"")
    (work / "count").write_text("{}")


def _computes(work: Path) -> None:
    _loaded(work)
    while True:  # a signal cannot tell this from compiled code: the process has no clock of its own here
        pass


def _starts_another(work: Path) -> None:
    import subprocess
    import sys

    _loaded(work)
    subprocess.run([sys.executable, "-c", "while True: pass"], check=False)


def _waits(work: Path) -> None:
    """And looks up now and then."""
    _loaded(work)
    while True:
        time.sleep(0.1)


def _goes_on(work: Path) -> None:
    """Longer than every limit, one input after the other."""
    _loaded(work)
    for number in range(30):
        end = time.process_time() + 0.05
        while time.process_time() < end:
            pass
        (work / "input").write_bytes(bytes([number]))


@pytest.mark.parametrize(
    ("body", "told"),
    [(_computes, "CPU time in compiled"), (_starts_another, "CPU time in"), (_waits, "waited for"), (_goes_on, "")],
)
def test_a_hang_is_seen_from_outside_and_slow_progress_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: Callable[[Path], None], told: str
) -> None:
    monkeypatch.setattr(fuzz, "HANG_SECONDS", 0.5)
    monkeypatch.setattr(fuzz, "GRACE_SECONDS", 0.2)
    monkeypatch.setattr(fuzz, "BLOCKED_SECONDS", 1.0)
    child = multiprocessing.get_context("fork").Process(target=body, args=(tmp_path,), daemon=True)
    child.start()
    died, _ = fuzz.watch(child, tmp_path)
    assert told in died if told else died == ""
    assert not child.is_alive()
    deadline = time.monotonic() + 5
    while living(child.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not living(child.pid)


def test_a_fault_that_repeats_is_told_from_one_that_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first process dies of either input; a fresh one only of one of them."""
    found = iter([[fuzz._Found("the process died", "", b"always")], [fuzz._Found("hang", "", b"once")]])

    def process(work: Path, *rest: Any) -> Any:
        if (only := rest[-1] if len(rest) == 6 else None) is not None:
            return ([fuzz._Found("again", "", only)] if only == b"always" else []), {}, 0.0
        work.mkdir()
        return next(found), {"read": 1.0}, 1.0

    monkeypatch.setattr(fuzz, "_one_process", process)
    told = bench_fuzz(seconds=2.0, keep=tmp_path / "keep")
    assert [entry["fault"] for entry in told["faults"]] == ["the process died"]
    assert [entry["fault"] for entry in told["not_repeated"]] == ["hang"]
    assert Path(told["not_repeated"][0]["input"]).read_bytes() == b"once" and told["inputs"] == 2

# SPDX-License-Identifier: Apache-2.0
"""Broken files to the readers of scans: a line or a volume, nothing else.

``FEDNEURO_FUZZ_EXAMPLES`` (default 100 per test) makes this longer; ``fedneuro-sim bench fuzz`` runs by the clock, with
limits on memory, and guided by coverage.
"""

import gzip
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

from fedneuro.privacy.errors import DataError
from fedneuro.simulations.benchmarks.fuzz import HANG_SECONDS, READERS, bench_fuzz, changed, sound_files

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


def _broken_reader(path: Path) -> None:
    if np.frombuffer(path.read_bytes()[:1].ljust(1), np.uint8)[0] % 2:
        raise RuntimeError("not a line")


def _slow_reader(_: Path) -> None:
    end = time.process_time() + 0.4
    while time.process_time() < end:
        pass


def test_the_clock_counts_the_readers_own_work_and_not_what_is_loaded_before(tmp_path: Path) -> None:
    """On a busy machine the first import took longer than the limit: stopped half-way, it broke every later one."""
    from fedneuro.simulations.benchmarks.fuzz import _shielded

    place = tmp_path / "site"
    assert _shielded(_slow_reader, tmp_path, place, b"", seconds=0.1).startswith("hang")
    assert _shielded(_slow_reader, tmp_path, place, b"", seconds=0) == "read"
    assert _shielded(lambda _: time.sleep(0.3), tmp_path, place, b"", seconds=0.1) == "read"


def test_the_bench_finds_what_is_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The short run finds nothing; a reader that raises something else is found, with the input."""
    found = bench_fuzz(tmp_path / "out.json", seconds=1.0, keep=tmp_path / "keep")
    assert found["faults"] == [] and found["inputs"] > 50 and not (tmp_path / "keep").exists()
    from fedneuro.simulations.benchmarks import fuzz

    readers: dict[str, Callable[[Path], None]] = {"nifti": _broken_reader}
    monkeypatch.setattr(fuzz, "READERS", readers)
    work = tmp_path / "work"
    work.mkdir()
    assert "RuntimeError: not a line" in fuzz._shielded(_broken_reader, work, work / "site", b"\x01")
    assert fuzz._shielded(_broken_reader, work, work / "site", b"\x02") == "read"

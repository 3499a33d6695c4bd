# SPDX-License-Identifier: Apache-2.0
"""Feeds broken files to the readers of scans, for as long as is wanted: no traceback, no hang, no flood of memory.

A reader may refuse a file with its own error, in one line, and may do nothing else. Files are made from sound ones:
bits flipped, numbers of the header replaced by extreme ones, parts cut, doubled or exchanged with another file's,
packed again or not. With atheris (``pip install atheris``) the changes are guided by which lines they reach.

The reader runs in a process of its own, limited to 2 GiB more than it starts with. Each input is on disk before it is
read, so a process that dies, or hangs in compiled code, leaves it behind; the parent writes it down and starts another.
"""

import gzip
import hashlib
import importlib
import importlib.util
import io
import json
import multiprocessing
import random
import resource
import shutil
import signal
import struct
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import numpy as np

from ...privacy.errors import DataError

__all__ = ["READERS", "bench_fuzz", "changed", "sound_files"]

MEMORY_BYTES: Final = 2 << 30
HANG_SECONDS: Final = 10
PATIENCE_SECONDS: Final = 30.0
"""Without a new input for so long, the process is ended from outside."""
MOST_FAULTS: Final = 50
TRACED: Final = ["nibabel", "pydicom", "fedneuro.client.data"]
"""Packages that tell atheris which lines they reach."""
START_SECONDS: Final = 120.0
"""What a process may take to load everything, on a machine that others use too."""
_INPUT: Final = "input"
_COUNT: Final = "count"
_FAULT: Final = "fault-"

Reader = Callable[[Path], None]


def _read_nifti(path: Path) -> None:
    from ...client.data.nifti import read_volume

    named = path.with_name("sub-1_T1w.nii.gz")
    path.rename(named)
    read_volume(named)


def _read_dicom(path: Path) -> None:
    """Everything of the import but the converter, which is a process with limits of its own."""
    from ...client.data.dicom.headers import find_instances, identifying_values
    from ...client.data.dicom.naming import propose
    from ...client.data.dicom.regions import read_regions, referenced_series, region_names
    from ...client.data.dicom.series import group, reference_stack
    from ...client.data.dicom.sidecar import free_text

    instances, _ = find_instances(path.parent)
    for series in group(instances):
        for instance in series.instances:
            identifying_values(instance, parts=True)
        free_text(series.first.text("SeriesDescription"), series)
        with suppress(DataError):
            if series.kind == "image":
                stack, _size = reference_stack(series)
                propose(series, stack.volumes)
        with suppress(DataError):
            if series.kind in ("segmentation", "structures"):
                region_names(series)
                referenced_series(series)
                read_regions(series, np.eye(4), (16, 12, 6))


def _import(path: Path) -> None:
    """The whole import of a folder with one object, dcm2niix included."""
    from ...client.data.dicom import import_dicom

    out = path.parent.with_name("imported")
    shutil.rmtree(out, ignore_errors=True)
    import_dicom(path.parent, out / "bids", out / "state")


READERS: Final[dict[str, Reader]] = {"nifti": _read_nifti, "dicom": _read_dicom, "import": _import}


def bench_fuzz(
    json_path: Path | None = None,
    *,
    reader: str = "nifti",
    seconds: float = 600.0,
    seed: int = 0,
    guided: bool = False,
    keep: Path | None = None,
    seeds: Path | None = None,
) -> dict[str, Any]:
    """Feed a reader for some time; returns (and saves) what happened.

    Args:
        json_path: where to save the figures.
        reader: of :data:`READERS`.
        seconds: how long.
        seed: of the changes; with ``guided`` of atheris.
        guided: by atheris, which must be installed.
        keep: folder for the inputs that showed a fault; None: they are not kept.
        seeds: folder of more sound files to start from.

    Raises:
        EnvironmentProblem: atheris is wanted and not installed.
    """
    if guided and importlib.util.find_spec("atheris") is None:
        from ...privacy.errors import EnvironmentProblem

        raise EnvironmentProblem("atheris is not installed; run: pip install atheris, or leave --guided out")
    end, counts = time.monotonic() + seconds, {"read": 0, "refused": 0}
    faults: dict[str, dict[str, Any]] = {}
    worst = {"seconds": 0.0, "mib": 0.0}
    with tempfile.TemporaryDirectory(prefix="fedneuro-fuzz-") as scratch:
        extra = [path.read_bytes() for path in sorted(seeds.rglob("*"))[:200] if path.is_file()] if seeds else []
        for number in range(10_000):
            left = end - time.monotonic()
            if left <= 0 or len(faults) >= MOST_FAULTS:
                break
            work = Path(scratch, str(number))
            work.mkdir()
            died = _one_process(work, reader, seed + number, left, guided, extra)
            told = json.loads((work / _COUNT).read_text()) if (work / _COUNT).exists() else {}
            for key in counts:
                counts[key] += told.get(key, 0)
            for key in worst:
                worst[key] = max(worst[key], told.get(key, 0.0))
            for path in sorted(work.glob(f"{_FAULT}*.text")):
                text = path.read_text(errors="replace")
                _note(faults, text.splitlines()[-1], text, path.with_suffix(".input"), keep, reader)
            if died:
                _note(faults, died, died, work / _INPUT, keep, reader)
    found = {
        "reader": reader, "guided": guided, "seconds": seconds, "inputs": sum(counts.values()), **counts,
        "slowest_s": round(worst["seconds"], 3), "peak_mib_above_start": round(worst["mib"], 1),
        "faults": list(faults.values()),
    }  # fmt: skip
    if json_path:
        json_path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return found


def _note(faults: dict[str, dict[str, Any]], name: str, text: str, cause: Path, keep: Path | None, reader: str) -> None:
    """Count a fault under its name, and keep the first input that showed it."""
    entry = faults.setdefault(name, {"fault": name, "processes": 0, "text": text[-1500:]})
    entry["processes"] += 1
    if keep and "input" not in entry and cause.exists():
        keep.mkdir(parents=True, exist_ok=True)
        entry["input"] = str(keep / f"{reader}-{len(faults)}")
        shutil.copy(cause, entry["input"])


def _one_process(work: Path, reader: str, seed: int, seconds: float, guided: bool, extra: list[bytes]) -> str:
    """Feed until the time is over; how the process died, or nothing."""
    context = multiprocessing.get_context("spawn")
    child = context.Process(target=_feed, args=(str(work), reader, seed, seconds, guided, extra), daemon=True)
    child.start()
    last, seen, end = time.monotonic() + START_SECONDS, -1, time.monotonic() + seconds + START_SECONDS
    while child.is_alive():
        child.join(0.5)
        with suppress(OSError, ValueError):
            told = json.loads((work / _COUNT).read_text())
            if told["read"] + told["refused"] != seen:
                seen, last = told["read"] + told["refused"], time.monotonic()
        if time.monotonic() - last > 2 * PATIENCE_SECONDS or time.monotonic() > end + PATIENCE_SECONDS:
            child.kill()
            child.join()
            return f"hang: no answer within {PATIENCE_SECONDS:g} s"
    return "" if child.exitcode == 0 else f"the process died with code {child.exitcode}"


class _Hang(BaseException):
    """The input takes too long."""


def _feed(work_text: str, reader: str, seed: int, seconds: float, guided: bool, extra: list[bytes]) -> None:
    work = Path(work_text)
    state: dict[str, float] = {"read": 0, "refused": 0, "seconds": 0.0, "mib": 0.0, "saved": 0.0}
    place = work / "site"
    with _traced(guided):
        read, corpus = READERS[reader], [*sound_files(reader), *extra]
        _shielded(read, work, place, corpus[0], seconds=0)  # everything is imported, however long that takes
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    if not guided:  # atheris needs room of its own
        resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY_BYTES, size + MEMORY_BYTES))
    end = time.monotonic() + seconds

    def once(raw: bytes) -> None:
        started = time.monotonic()
        outcome = _shielded(read, work, place, raw)
        took = time.monotonic() - started
        if outcome in ("read", "refused"):
            state[outcome] += 1
        state["seconds"] = max(state["seconds"], took)
        state["mib"] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        if time.monotonic() - state["saved"] > 1:
            state["saved"] = time.monotonic()
            (work / _COUNT).write_text(json.dumps(state))
        if outcome not in ("read", "refused"):
            name = hashlib.sha256(outcome.splitlines()[-1].encode()).hexdigest()[:12]
            if not (work / f"{_FAULT}{name}.text").exists():
                (work / f"{_FAULT}{name}.input").write_bytes(raw)
                (work / f"{_FAULT}{name}.text").write_text(outcome)

    if guided:
        _guided(work, corpus, seed, seconds, once)
    else:
        rng = random.Random(seed)  # noqa: S311 - changes of test files
        while time.monotonic() < end:
            once(changed(corpus, rng))
    (work / _COUNT).write_text(json.dumps(state))


def _shielded(read: Reader, work: Path, place: Path, raw: bytes, seconds: float = HANG_SECONDS) -> str:
    """``read``, ``refused``, or the fault in words."""
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    (work / _INPUT).write_bytes(raw)
    path = place / "object"
    path.write_bytes(raw)
    try:
        with _clock(seconds):
            read(path)
    except DataError as error:
        lines = str(error).splitlines()
        return "refused" if len(lines) == 1 and len(lines[0]) < 1000 else f"a message of {len(lines)} lines: {error}"
    except _Hang:
        return f"hang: over {HANG_SECONDS} s of CPU time\n{traceback.format_exc()[-1500:]}"
    except Exception:
        return traceback.format_exc()[-3000:]
    return "read"


@contextmanager
def _clock(seconds: float) -> Iterator[None]:
    """Stop after so many seconds of this process's CPU time (0: never); who waits for ever is ended from outside."""

    def late(*_: object) -> None:
        raise _Hang

    signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


@contextmanager
def _traced(guided: bool) -> Iterator[None]:
    """What is imported within tells atheris which lines it reaches."""
    if not guided:
        yield
        return
    atheris: Any = importlib.import_module("atheris")
    with atheris.instrument_imports(include=TRACED):
        yield


def _guided(work: Path, corpus: list[bytes], seed: int, seconds: float, once: Callable[[bytes], None]) -> None:
    folder = work / "corpus"
    folder.mkdir()
    for number, raw in enumerate(corpus):
        (folder / str(number)).write_bytes(raw)
    atheris: Any = importlib.import_module("atheris")
    options = [f"-max_total_time={max(1, int(seconds))}", f"-seed={seed + 1}", "-max_len=65536", "-rss_limit_mb=0"]
    quiet = ["-verbosity=0", "-print_final_stats=0", "-timeout=60", "-handle_alrm=0"]
    atheris.Setup(["fuzz", *options, *quiet, str(folder)], once)
    with suppress(SystemExit):
        atheris.Fuzz()


# -- sound files, and what is done to them


def sound_files(reader: str) -> list[bytes]:
    """Small files that the reader takes."""
    return _niftis() if reader == "nifti" else _dicoms()


def _niftis() -> list[bytes]:
    import nibabel

    nib: Any = nibabel
    found = []
    for shape, dtype, kind in (
        ((6, 5, 4), np.int16, nib.Nifti1Image), ((6, 5, 4), np.float32, nib.Nifti1Image),
        ((5, 4), np.uint8, nib.Nifti1Image), ((4, 4, 3, 1), np.float64, nib.Nifti2Image),
    ):  # fmt: skip
        image = kind(np.arange(np.prod(shape)).reshape(shape).astype(dtype), np.diag([-1.0, -1.0, 2.0, 1.0]))
        image.header.set_xyzt_units("mm", "sec")
        raw = image.to_bytes()
        found += [raw, gzip.compress(raw, mtime=0)]
    return found


def _dicoms() -> list[bytes]:
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import UID, ExplicitVRLittleEndian, ImplicitVRLittleEndian

    found = []
    for sop, syntax in (("4", ExplicitVRLittleEndian), ("2", ImplicitVRLittleEndian), ("66.4", ExplicitVRLittleEndian)):
        meta = FileMetaDataset()
        meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = syntax, UID(f"1.2.840.10008.5.1.4.1.1.{sop}")
        meta.MediaStorageSOPInstanceUID = UID("1.2.3.4")
        item = FileDataset(None, {}, file_meta=meta, preamble=bytes(128))  # type: ignore[arg-type]
        item.SOPClassUID, item.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
        item.PatientName, item.PatientID, item.StudyInstanceUID = "Muster^Erika", "4711", UID("1.2.3")
        item.SeriesInstanceUID, item.Modality, item.SeriesDescription = UID("1.2.3.5"), "MR", "t2 flair"
        item.ImageType, item.Rows, item.Columns = ["ORIGINAL", "PRIMARY"], 4, 4
        item.SamplesPerPixel, item.PhotometricInterpretation = 1, "MONOCHROME2"
        item.BitsAllocated, item.BitsStored, item.HighBit, item.PixelRepresentation = 16, 16, 15, 0
        item.PixelSpacing, item.ImagePositionPatient = [1, 1], [0, 0, 0]
        item.ImageOrientationPatient, item.PixelData = [1, 0, 0, 0, 1, 0], bytes(32)
        buffer = io.BytesIO()
        item.save_as(buffer, enforce_file_format=True)
        found.append(buffer.getvalue())
    return found


_EXTREMES: Final = (
    *(struct.pack("<h", n) for n in (0, -1, 1, 32767, -32768, 7, 8)),
    *(struct.pack("<i", n) for n in (0, -1, 2**31 - 1, -(2**31), 540, 348)),
    *(struct.pack("<f", n) for n in (float("nan"), float("inf"), -1e38, 1e-45, 0.0)),
    *(struct.pack("<q", n) for n in (2**62, -1)), b"\xff" * 8, bytes(16),
)  # fmt: skip
MAX_INPUT: Final = 1 << 16


def changed(corpus: list[bytes], rng: random.Random) -> bytes:
    """A sound file with a few things wrong in it."""
    raw = rng.choice(corpus)
    packed = raw.startswith(b"\x1f\x8b")
    inner = packed and rng.random() < 0.7
    data = bytearray(gzip.decompress(raw) if inner else raw)
    for _ in range(rng.choice((1, 1, 2, 3, 5, 20))):
        _change(data, corpus, rng)
    result = bytes(data[:MAX_INPUT])
    return gzip.compress(result, 1, mtime=0) if inner else result


def _change(data: bytearray, corpus: list[bytes], rng: random.Random) -> None:
    at = rng.randrange(min(len(data), 400) if data and rng.random() < 0.6 else max(len(data), 1))  # headers count most
    kind = rng.randrange(7)
    if kind == 0 and data:
        data[at % len(data)] ^= 1 << rng.randrange(8)
    elif kind in (1, 2):
        extreme = rng.choice(_EXTREMES)
        data[at : at + len(extreme)] = extreme
    elif kind == 3:
        del data[at:]
    elif kind == 4:
        del data[at : at + rng.randrange(1, 64)]
    elif kind == 5:
        data[at:at] = data[at : at + rng.randrange(1, 256)]
    else:
        other = rng.choice(corpus)
        start = rng.randrange(max(len(other), 1))
        part = other[start : start + rng.randrange(1, 400)]
        data[at : at + len(part)] = part

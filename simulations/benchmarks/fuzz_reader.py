# SPDX-License-Identifier: Apache-2.0
"""The process of :mod:`.fuzz` that reads: one input after the other, each on disk before it is read.

What it tells its parent lies in its folder: ``input`` (what is being read), ``count`` (how far it is; there once
everything is loaded), and a pair of files for each kind of fault. After an input that took too long or too much memory
it ends, as what such a stop leaves behind cannot be trusted.
"""

import hashlib
import importlib
import json
import os
import random
import resource
import shutil
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import numpy as np

from ...privacy.errors import DataError
from .fuzz_inputs import MAX_INPUT, changed, changed_inside, sound_files

__all__ = ["COUNT", "FAULT", "HANG_SECONDS", "INPUT", "MEMORY_BYTES", "READERS", "feed", "shielded"]

MEMORY_BYTES: Final = 2 << 30
"""That one small file may take."""
ADDRESS_BYTES: Final = 6 << 30
"""That the process may map beyond what it starts with: more than is permitted, so that the excess is seen."""
HANG_SECONDS: Final = 10
"""Of the process's own CPU time, that one file may take."""
TRACED: Final = ["nibabel", "pydicom", "highdicom", "fedneuro.client.data"]
"""Packages that tell atheris which lines they reach."""
INPUT: Final = "input"
COUNT: Final = "count"
FAULT: Final = "fault-"

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


def feed(
    folder: str, reader: str, seed: int, seconds: float, guided: bool, extra: list[bytes], only: bytes | None
) -> None:
    """Read changed files for so many seconds, or one file.

    Args:
        folder: of this process's own; below its parent folder, guided processes share what they learned.
        reader: of :data:`READERS`.
        seed: of the changes.
        seconds: how long, counted from when everything is loaded.
        guided: by atheris.
        extra: more sound files.
        only: the one input to read; None: changed ones.
    """
    os.setsid()  # what a reader starts is ended with it
    work = Path(folder)
    with _traced(guided):
        read, corpus = READERS[reader], [*sound_files(reader), *extra]
        for raw in corpus:
            shielded(read, work, raw, seconds=0)  # everything is imported, however long that takes
    told = _Told(work)
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    if not guided:  # atheris needs room of its own
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + ADDRESS_BYTES, hard))

    def once(raw: bytes) -> None:
        started, cpu = time.monotonic(), time.process_time()
        outcome = shielded(read, work, raw)
        told.note(raw, outcome, time.monotonic() - started, time.process_time() - cpu)

    if only is not None:
        once(only)
    elif guided:
        _guided(work.parent / "corpus", corpus, seed, seconds, once)
    else:
        rng, end = random.Random(seed), time.monotonic() + seconds  # noqa: S311 - changes of test files
        while time.monotonic() < end:
            once(changed(corpus, rng))
    told.save()


class _Told:
    """Counts, the worst case, and the first input of each kind of fault, on disk."""

    def __init__(self, work: Path) -> None:
        self.work = work
        self.state: dict[str, float] = {"read": 0, "refused": 0, "seconds": 0.0, "cpu_seconds": 0.0, "mib": 0.0}
        self.before = _peak()
        self.saved = 0.0
        self.save()

    def note(self, raw: bytes, outcome: str, seconds: float, cpu: float) -> None:
        """One input was read; ends the process where nothing after it can be trusted."""
        state, grown = self.state, _peak() - self.before
        if outcome in ("read", "refused"):
            state[outcome] += 1
        state["seconds"], state["cpu_seconds"] = max(state["seconds"], seconds), max(state["cpu_seconds"], cpu)
        state["mib"] = grown / 2**20
        if grown > MEMORY_BYTES:
            outcome = f"memory: over {MEMORY_BYTES >> 20} MiB"
        if outcome not in ("read", "refused"):
            name = hashlib.sha256(outcome.splitlines()[-1].encode()).hexdigest()[:12]
            if not (self.work / f"{FAULT}{name}.text").exists():
                (self.work / f"{FAULT}{name}.input").write_bytes(raw)
                (self.work / f"{FAULT}{name}.text").write_text(outcome)
        if time.monotonic() - self.saved > 1:
            self.save()
        if outcome.startswith(("hang", "memory")):
            self.save()
            os._exit(0)

    def save(self) -> None:
        """Write the counts in one step."""
        self.saved = time.monotonic()
        (self.work / f".{COUNT}").write_text(json.dumps(self.state))
        (self.work / f".{COUNT}").replace(self.work / COUNT)


def _peak() -> int:
    """Most memory that the process has held so far, bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def shielded(read: Reader, work: Path, raw: bytes, seconds: float = HANG_SECONDS) -> str:
    """``read``, ``refused``, or the fault, of which the last line is its name."""
    place = work / "site"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    (work / INPUT).write_bytes(raw)
    path = place / "object"
    path.write_bytes(raw)
    try:
        with _clock(seconds):
            read(path)
    except DataError as error:
        if _of_memory(error):
            return "memory: more asked for than there is"
        lines = str(error).splitlines()
        return "refused" if len(lines) == 1 and len(lines[0]) < 1000 else f"{error}\na message of several lines"
    except _Hang:
        return f"hang\n{traceback.format_exc()[-1500:]}\nhang: over {HANG_SECONDS} s of CPU time"
    except Exception:
        return traceback.format_exc()[-3000:]
    return "read"


def _of_memory(error: BaseException | None) -> bool:
    """Whether it was raised because memory was refused."""
    while error is not None:
        if isinstance(error, MemoryError):
            return True
        error = error.__cause__ or error.__context__
    return False


class _Hang(BaseException):
    """The input takes too long."""


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


def _guided(folder: Path, corpus: list[bytes], seed: int, seconds: float, once: Callable[[bytes], None]) -> None:
    folder.mkdir(exist_ok=True)
    for number, raw in enumerate(corpus):
        (folder / str(number)).write_bytes(raw)
    atheris: Any = importlib.import_module("atheris")

    def mutate(raw: bytes, size: int, number: int) -> bytes:
        if number % 4 == 0:  # our own changes know where headers are, and mix files
            return changed([raw or corpus[0], *corpus], random.Random(number))[:size]  # noqa: S311
        return changed_inside(raw, atheris.Mutate, size, number)

    options = [f"-max_total_time={max(1, int(seconds))}", f"-seed={seed + 1}", f"-max_len={MAX_INPUT}"]
    # Its own clock goes by the wall, and 0 is no time at all: an hour, so that ours comes first.
    quiet = ["-rss_limit_mb=0", "-verbosity=0", "-print_final_stats=0", "-timeout=3600", "-handle_alrm=0"]
    atheris.Setup(
        ["fuzz", *options, *quiet, f"-artifact_prefix={folder.parent}/", str(folder)], once, custom_mutator=mutate
    )
    with suppress(SystemExit):
        atheris.Fuzz()

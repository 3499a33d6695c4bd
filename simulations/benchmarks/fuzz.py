# SPDX-License-Identifier: Apache-2.0
"""Feeds broken files to the readers of scans, for as long as is wanted: no traceback, no hang, no flood of memory.

A reader may refuse a file with its own error, in one line, and may do nothing else. Inputs are :mod:`.fuzz_inputs`;
with atheris (``pip install atheris``) their changes are guided by which lines they reach. The reader runs in a process
of its own (:mod:`.fuzz_reader`), which this one watches, so one that dies or hangs in compiled code leaves its input.

On a machine that others use too, seconds of the wall clock say nothing about a reader. So:

- a *hang* is 10 s of CPU time on one input, of the process and all that it started: its own clock stops it between two
  steps of Python, and this process where it is in compiled code; or two minutes in which it neither computes nor is
  ready to, as one that waits for something that never comes;
- *memory* is what the process holds more than before, above 2 GiB, or what it asked for in vain;
- every fault is tried again, with its input alone, in a fresh process. What does not repeat is told beside the faults.
"""

import importlib.util
import json
import multiprocessing
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from .fuzz_reader import COUNT, FAULT, HANG_SECONDS, INPUT, READERS, feed

__all__ = ["READERS", "bench_fuzz", "watch"]

GRACE_SECONDS: Final = 5.0
"""CPU time beyond the limit that the process's own clock is given."""
BLOCKED_SECONDS: Final = 120.0
"""Wall time without computing, and without waiting for a processor."""
IDLE_SHARE: Final = 0.1
"""Of that time, what a process that waits may compute: Python's own threads look up now and then."""
LOADING_SECONDS: Final = 900.0
"""CPU time to load everything, traced by atheris or not."""
MOST_FAULTS: Final = 50
_LOOK_SECONDS: Final = 0.25


@dataclass(frozen=True, slots=True)
class _Found:
    """One kind of fault: its last line, all of it, and the first input that showed it."""

    name: str
    text: str
    raw: bytes


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
        seconds: how long, loading not counted.
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
    counts, left = {"read": 0, "refused": 0}, seconds
    faults: dict[str, dict[str, Any]] = {}
    worst = {"seconds": 0.0, "cpu_seconds": 0.0, "mib": 0.0}
    with tempfile.TemporaryDirectory(prefix="fedneuro-fuzz-") as scratch:
        extra = [path.read_bytes() for path in sorted(seeds.rglob("*"))[:200] if path.is_file()] if seeds else []
        for number in range(10_000):
            if left <= 0 or len(faults) >= MOST_FAULTS:
                break
            work = Path(scratch, str(number))
            found, told, spent = _one_process(work, reader, seed + number, left, guided, extra)
            left -= max(spent, 1.0)
            for key in counts:
                counts[key] += int(told.get(key, 0))
            for key in worst:
                worst[key] = max(worst[key], told.get(key, 0.0))
            for fault in found:
                entry = faults.setdefault(fault.name, {"fault": fault.name, "processes": 0, "text": fault.text[-1500:]})
                entry["processes"] += 1
                if entry["processes"] == 1:
                    entry["repeats"] = _repeats(work / f"again-{len(faults)}", reader, fault)
                    if keep:
                        entry["input"] = str(keep / f"{reader}-{len(faults)}")
                        keep.mkdir(parents=True, exist_ok=True)
                        Path(entry["input"]).write_bytes(fault.raw)
            shutil.rmtree(work, ignore_errors=True)
    result = {
        "reader": reader, "guided": guided, "seconds": seconds, "inputs": sum(counts.values()), **counts,
        "slowest_s": round(worst["seconds"], 3), "slowest_cpu_s": round(worst["cpu_seconds"], 3),
        "peak_mib_above_start": round(worst["mib"], 1),
        "faults": [entry for entry in faults.values() if entry["repeats"]],
        "not_repeated": [entry for entry in faults.values() if not entry["repeats"]],
    }  # fmt: skip
    if json_path:
        json_path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


def _repeats(work: Path, reader: str, fault: _Found) -> bool:
    """Whether the input is a fault again, of any name, when a fresh process reads it alone."""
    found, _, _ = _one_process(work, reader, 0, 0.0, False, [], fault.raw)
    return bool(found)


def _one_process(
    work: Path, reader: str, seed: int, seconds: float, guided: bool, extra: Sequence[bytes], only: bytes | None = None
) -> tuple[list[_Found], dict[str, float], float]:
    """Feed until the time is over; the faults, what the process counted, and the seconds it fed for."""
    work.mkdir(parents=True)
    context = multiprocessing.get_context("spawn")
    child = context.Process(
        target=feed, args=(str(work), reader, seed, seconds, guided, list(extra), only), daemon=True
    )
    child.start()
    died, spent = watch(child, work)
    found = []
    for path in sorted(work.glob(f"{FAULT}*.text")):
        text = path.read_text(errors="replace")
        found.append(_Found(text.splitlines()[-1], text, path.with_suffix(".input").read_bytes()))
    if died:
        raw = (work / INPUT).read_bytes() if (work / INPUT).exists() else b""
        found.append(_Found(died, died, raw))
    told: dict[str, float] = json.loads((work / COUNT).read_text()) if (work / COUNT).exists() else {}
    return found, told, spent


def watch(child: Any, work: Path) -> tuple[str, float]:
    """Wait for a process that reads.

    Args:
        child: :class:`multiprocessing.Process`, leader of a session of its own once it runs.
        work: its folder.

    Returns:
        How it died, or nothing; and the seconds since everything was loaded.
    """
    mark, since, blocked, loaded = 0, 0.0, 0.0, 0.0
    before = time.monotonic()
    while child.is_alive():
        child.join(_LOOK_SECONDS)
        now = time.monotonic()
        if not loaded and (work / COUNT).exists():
            loaded = now
        cpu, ready = _usage(child.pid)
        if (seen := _mark(work / INPUT)) != mark:
            mark, since, blocked = seen, cpu, 0.0
        if not ready:  # a look that comes late says little of the time before it: this process had to wait, too
            blocked += min(now - before, 2 * _LOOK_SECONDS)
        before = now
        limit = HANG_SECONDS + GRACE_SECONDS if loaded else LOADING_SECONDS
        idle = blocked > BLOCKED_SECONDS and cpu - since < IDLE_SHARE * blocked
        why = f"hang: waited for {BLOCKED_SECONDS:g} s" if idle else ""
        if cpu - since > limit:
            why = f"hang: over {limit:g} s of CPU time in compiled code or another process"
        if why:
            _end(child)
            return why, now - (loaded or now)
    spent = time.monotonic() - (loaded or time.monotonic())
    return ("" if child.exitcode == 0 else f"the process died with code {child.exitcode}"), spent


def _mark(path: Path) -> int:
    with suppress(OSError):
        return path.stat().st_mtime_ns
    return 0


def _usage(pid: int) -> tuple[float, bool]:
    """CPU seconds of a process and all that it started, and whether one of them computes or waits for a processor."""
    import psutil

    total, ready = 0.0, False
    with suppress(psutil.Error):
        top = psutil.Process(pid)
        for process in (top, *top.children(recursive=True)):
            with suppress(psutil.Error):
                times = process.cpu_times()
                total += times.user + times.system
                if process is top:
                    total += times.children_user + times.children_system
                ready |= process.status() in (psutil.STATUS_RUNNING, psutil.STATUS_DISK_SLEEP)
    return total, ready


def _end(child: Any) -> None:
    """End a process and all that it started."""
    with suppress(ProcessLookupError, PermissionError):
        if os.getpgid(child.pid) == child.pid:
            os.killpg(child.pid, signal.SIGKILL)
    child.kill()
    child.join()

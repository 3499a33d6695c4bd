# SPDX-License-Identifier: Apache-2.0
"""Fills the cache with several processes. Each scan is prepared from itself alone, so their number changes no bit.

A build that is interrupted goes on where it was: what is in the cache is not made again. A scan with a fault is told,
and the others go on.
"""

import importlib
import multiprocessing
import multiprocessing.context
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from ...privacy.errors import DataError, EnvironmentProblem
from ...privacy.processes import end_with_parent
from ...privacy.study import Study
from .bids import ScanFiles
from .cache import ScanCache, Summary
from .preprocess import content_key, prepare

__all__ = ["Built", "Progress", "build_entries"]

Progress = Callable[[int, int], None]
"""Called after each scan with the number done and the number in all."""
Built = tuple[str, Summary] | DataError
"""Key and summary of a scan that is in the cache or could not be put there, or its fault."""


def build_entries(
    scans: Sequence[ScanFiles],
    study: Study,
    folder: Path,
    *,
    limit: int,
    since: float,
    workers: int,
    progress: Progress | None = None,
) -> dict[ScanFiles, Built]:
    """Prepare the scans that the cache does not hold.

    Args:
        scans: each with its mask, for segmentation.
        study: decides the preprocessing.
        folder: of the cache.
        limit: bytes that the cache may take.
        since: time from which on used entries are kept.
        workers: processes, at least 1.
        progress: told of each scan.

    Raises:
        EnvironmentProblem: a process died.
    """
    context = _context(study)
    found: dict[ScanFiles, Built] = {}
    files: ScanFiles | None = None
    pool = ProcessPoolExecutor(
        min(workers, len(scans)) or 1,
        mp_context=context,
        initializer=_start,
        initargs=(study.canonical, folder, limit, since),
    )
    try:
        waiting = {pool.submit(_build, scan): scan for scan in scans}
        for done in as_completed(waiting):
            files = waiting.pop(done)
            try:
                found[files] = done.result()
            except DataError as error:
                found[files] = error
            if progress:
                progress(len(found), len(scans))
    except BrokenProcessPool as error:
        where = f"{files.name}: " if files else ""  # without one: it died before all were handed out
        raise EnvironmentProblem(
            f"{where}a process that prepared scans was ended, perhaps for memory; use fewer --workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)
    return found


def _context(study: Study) -> multiprocessing.context.BaseContext:
    """How workers start: as copies of this process, which is quick, where that is safe; else as copies of a clean one.

    A copy of a process with several threads may wait for ever for a lock that a thread held, and one with a GPU in use
    cannot use it.
    """
    import torch

    cuda: Any = torch.cuda
    resampling = ["monai.transforms.spatial.dictionary"] if study.data.spacing else []
    if threading.active_count() == 1 and not cuda.is_initialized():
        for name in resampling:
            importlib.import_module(name)
        return multiprocessing.get_context("fork")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, *resampling])  # loaded once
    return context


_worker: tuple[Study, ScanCache] | None = None


def _start(canonical: bytes, folder: Path, limit: int, since: float) -> None:
    global _worker
    import torch

    end_with_parent(os.getppid())  # a pool's process whose parent was killed waits for work for ever
    torch.set_num_threads(1)
    _worker = Study.model_validate_json(canonical), ScanCache(folder, limit, since)


def _build(files: ScanFiles) -> tuple[str, Summary]:
    assert _worker is not None  # noqa: S101 - the pool has started this process
    study, cache = _worker
    key = content_key(files, study)
    summary = cache.summary(key)
    if summary is None:
        scan = prepare(files, study)
        summary = Summary.of(scan)
        cache.save(key, scan)
    return key, summary

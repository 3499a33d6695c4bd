# SPDX-License-Identifier: Apache-2.0
"""Preprocessed scans on the hospital's disk, keyed by content: ``CACHE/ab/abcd….safetensors``.

The key covers the bytes of the input files and every setting of preprocessing (:func:`.preprocess.content_key`), so an
entry can be stale for nobody and the folder can be deleted at any time. What the cache promises:

- *whole*: entries are written beside their place and moved there, and hold a check sum, which is tested when a
  process first reads them. What a killed process left behind is removed after an hour.
- *shared*: any number of processes may build and read one cache. Two that prepare the same scan write the same
  content, and the later one stays; an entry that is removed while another process has it mapped stays readable there.
- *mapped*: voxels are read from the file when they are touched, and the system's page cache holds them, once for
  all processes. Entries are never changed in place, and are read-only: a file that was cut off by hand under a running
  training would end its process, as with any mapped file.
- *bounded*: beyond its limit (within 2 % for each process that writes) the entries used longest ago are removed, none
  that was used since the study was opened. A cache that holds nothing else, or cannot be written, costs time and not
  the study: it says so once and is then left alone.
- *private*: readable by their owner alone, as they are patients' scans.
"""

import fcntl
import hashlib
import json
import logging
import mmap
import os
import resource
import tempfile
import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError
from safetensors.torch import save

from .preprocess import Prepared

__all__ = ["LIMIT", "ScanCache", "ScanMemory", "Summary"]

LIMIT: Final = 64 * 2**30
"""Bytes of a cache on disk."""
KEPT_SHARE: Final = 0.9
"""Of the limit, after room was made: so that it is not made for every scan."""
RECOUNT_SHARE: Final = 0.02
"""Of the limit: what one process writes before it looks again at what others wrote."""
MEMORY_LIMIT: Final = 2 * 2**30
"""Bytes of preprocessed scans that one site keeps in memory; scans that are mapped from the cache do not count."""
MOST_PATIENTS: Final = 10_000
"""Held at once, mapped ones too: a process may map some 65,000 files."""
STALE_SECONDS: Final = 3600
CLOCKS: Final = 1.0
"""Seconds by which the clocks of file systems and machines may differ."""
MAX_HEADER_BYTES: Final = 2**16
"""Ours are a few hundred bytes; a damaged length must not fill the memory."""

_LOG = logging.getLogger(__name__)
_LENGTH_BYTES: Final = 8
_FRESH: Final = ".new-"
_LOCK: Final = ".lock"
_FAULTS = (OSError, SafetensorError, ValueError, KeyError, TypeError)
_TYPES: Final = {"F32": torch.float32, "U8": torch.uint8}


@dataclass(frozen=True, slots=True)
class Summary:
    """What opening a site needs to know of a scan, without its voxels."""

    shape: tuple[int, ...]  # (X, Y, Z) after preprocessing
    spacing: tuple[float, float, float] | None  # mm
    oriented: bool

    @classmethod
    def of(cls, scan: Prepared) -> "Summary":
        """Summary of a prepared scan."""
        return cls(tuple(scan.image.shape[1:]), scan.spacing, scan.oriented)


class ScanCache:
    """A folder of preprocessed scans; with ``folder=None`` it keeps nothing.

    Args:
        folder: made if need be.
        limit: bytes that it may take on disk.
        since: time from which on entries that anyone used are kept; None: now.
    """

    def __init__(self, folder: Path | None, limit: int = LIMIT, since: float | None = None) -> None:
        self.folder, self.limit = folder, limit
        self.since = time.time() - CLOCKS if since is None else since
        self.problem = ""
        """Why entries are no longer written; empty while all is well."""
        self._used: set[str] = set()
        self._bytes = -1  # on disk as far as we know; -1: not yet counted
        self._written = 0  # by us since they were counted

    def path(self, key: str) -> Path | None:
        """Place of an entry."""
        return self.folder / key[:2] / f"{key}.safetensors" if self.folder else None

    def summary(self, key: str) -> Summary | None:
        """Shape and spacing of an entry from its header, or None if there is no sound one."""
        path = self.path(key)
        if path is None or not path.exists():
            return None
        try:
            with path.open("rb") as file:
                head = file.read(_LENGTH_BYTES)
                header = json.loads(file.read(_header_bytes(head)))
                found = _summary(header["__metadata__"], tuple(header["image"]["shape"][1:]))
        except _FAULTS:
            return None
        self._touch(key, path)
        return found

    def load(self, key: str) -> Prepared | None:
        """The scan, mapped, or None if there is no entry or its content does not match its check sum."""
        path = self.path(key)
        if path is None or not path.exists():
            return None
        try:
            _many_files()
            with path.open("rb") as file:
                # Copy on write: whoever writes into a tensor changes its own memory, never the file.
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            tensors, metadata = _tensors(mapped)
            if _checksum(tensors, metadata["spacing"], metadata["oriented"]) != metadata["sha256"]:
                raise ValueError("check sum differs")
            summary = _summary(metadata, tuple(tensors["image"].shape[1:]))
        except _FAULTS as error:
            _LOG.warning("cache entry %s is damaged (%s); it is made again", path.name, error)
            return None
        self._touch(key, path)
        return Prepared(tensors["image"], tensors.get("mask"), summary.spacing, summary.oriented, mapped=True)

    def save(self, key: str, scan: Prepared) -> bool:
        """Write an entry atomically; False if the disk does not take it, with the reason in :attr:`problem`."""
        path = self.path(key)
        if path is None or self.problem:
            return False
        tensors = {"image": scan.image} | ({"mask": scan.mask} if scan.mask is not None else {})
        spacing, oriented = json.dumps(scan.spacing), json.dumps(scan.oriented)
        metadata = {"spacing": spacing, "oriented": oriented, "sha256": _checksum(tensors, spacing, oriented)}
        content = save(tensors, metadata)
        self._used.add(key)
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not self._room_for(len(content)):
                return False
            _write(path, content)
        except OSError as error:
            self.problem = (
                f"cache {self.folder} cannot be written ({error.strerror or error}): scans are prepared "
                "again in every run; free some space, or give another folder"
            )
            _LOG.warning(self.problem)
            return False
        self._bytes += len(content)
        self._written += len(content)
        return True

    def _touch(self, key: str, path: Path) -> None:
        """Note that an entry is in use, here and, by its time, for others."""
        if key not in self._used:
            self._used.add(key)
            with suppress(OSError):
                os.utime(path)

    def _room_for(self, size: int) -> bool:
        """Keep the folder below its limit: remove what was used longest ago, but nothing in use."""
        assert self.folder is not None  # noqa: S101 - the caller has a place
        if self._bytes < 0:
            self._sweep()
        if self._bytes < 0 or self._written > RECOUNT_SHARE * self.limit:  # others may have written, too
            self._bytes, self._written = sum(size for _, size, _ in self._entries()), 0
        if self._bytes + size <= self.limit:
            return True
        with (self.folder / _LOCK).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # one process makes room; the next one counts again
            found = sorted(self._entries())
            self._bytes = sum(size for _, size, _ in found)
            for used, freed, path in found:
                if self._bytes + size <= KEPT_SHARE * self.limit:
                    break
                if path.stem not in self._used and used < self.since:
                    path.unlink(missing_ok=True)
                    self._bytes -= freed
        if self._bytes + size <= self.limit:
            return True
        self.problem = (
            f"cache {self.folder} is full ({self.limit / 2**30:.3g} GiB, all of it in use here): the other scans are "
            "prepared again in every run; give it more space"
        )
        _LOG.warning(self.problem)
        return False

    def _entries(self) -> Iterator[tuple[float, int, Path]]:
        """When each entry was last used, its bytes and its place."""
        assert self.folder is not None  # noqa: S101 - the caller has a place
        for path in self.folder.glob("*/*.safetensors"):
            with suppress(OSError):
                state = path.stat()
                yield state.st_mtime, state.st_size, path

    def _sweep(self) -> None:
        """Remove what killed processes left half written."""
        assert self.folder is not None  # noqa: S101 - the caller has a place
        for path in self.folder.glob(f"*/{_FRESH}*"):
            with suppress(OSError):
                if path.stat().st_mtime < time.time() - STALE_SECONDS:
                    path.unlink()


class ScanMemory:
    """Scans in memory, by patient; beyond ``limit`` bytes the patients used longest ago are let go."""

    def __init__(self, limit: int = MEMORY_LIMIT) -> None:
        self.limit = limit
        self.held = 0
        self._scans: OrderedDict[str, tuple[Prepared, ...]] = OrderedDict()

    def get(self, patient: str) -> tuple[Prepared, ...] | None:
        """The patient's scans, if they are held."""
        if patient in self._scans:
            self._scans.move_to_end(patient)
        return self._scans.get(patient)

    def put(self, patient: str, scans: tuple[Prepared, ...]) -> None:
        """Hold a patient's scans; one patient is always held, whatever the limit."""
        self._scans[patient] = scans
        self.held += _resident(scans)
        while (self.held > self.limit or len(self._scans) > MOST_PATIENTS) and len(self._scans) > 1:
            _, gone = self._scans.popitem(last=False)
            self.held -= _resident(gone)


def _resident(scans: tuple[Prepared, ...]) -> int:
    return sum(scan.nbytes for scan in scans if not scan.mapped)


def _header_bytes(head: bytes) -> int:
    """Length of safetensors' JSON header, which the first eight bytes hold."""
    return min(int.from_bytes(head[:_LENGTH_BYTES], "little"), MAX_HEADER_BYTES)


@cache
def _many_files() -> None:
    """A mapped entry holds a file open; a thousand patients are more than most systems allow a process at first."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _tensors(mapped: mmap.mmap) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors of a file in safetensors' format, where they lie, and its metadata.

    Raises:
        ValueError, KeyError, TypeError: the file holds something else.
    """
    start = _LENGTH_BYTES + _header_bytes(mapped[:_LENGTH_BYTES])
    header: dict[str, Any] = json.loads(mapped[_LENGTH_BYTES:start])
    metadata: dict[str, str] = header.pop("__metadata__")
    tensors = {}
    for name, entry in header.items():
        dtype, shape = _TYPES[entry["dtype"]], tuple(int(n) for n in entry["shape"])
        first, last = (int(n) for n in entry["data_offsets"])
        count = (last - first) // dtype.itemsize
        if min(shape, default=0) < 1 or torch.Size(shape).numel() != count:
            raise ValueError(f"{name} has another size than its shape")
        tensors[name] = torch.frombuffer(mapped, dtype=dtype, count=count, offset=start + first).reshape(shape)
    return tensors, metadata


def _write(path: Path, content: bytes) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=_FRESH)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        Path(name).chmod(0o400)  # nobody writes into what may be mapped
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _summary(metadata: dict[str, str], shape: tuple[int, ...]) -> Summary:
    spacing = json.loads(metadata["spacing"])
    if spacing is not None:
        x, y, z = (float(s) for s in spacing)
        spacing = (x, y, z)
    return Summary(shape, spacing, bool(json.loads(metadata["oriented"])))


def _checksum(tensors: dict[str, torch.Tensor], spacing: str, oriented: str) -> str:
    digest = hashlib.sha256(f"{spacing} {oriented};".encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.numpy().data)
    return digest.hexdigest()

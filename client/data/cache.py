# SPDX-License-Identifier: Apache-2.0
"""Preprocessed scans on the hospital's disk, keyed by content: ``CACHE/ab/abcd….safetensors``.

The key covers the bytes of the input files and every setting (:func:`.preprocess.content_key`), so an entry can be
stale for nobody and the folder can be deleted at any time. Entries are written beside their place and moved
there, hold a check sum, and are readable by their owner alone, as they are patients' scans. A cache that
cannot be written costs time, not the study: it says so once and is then left alone.
"""

import hashlib
import json
import logging
import os
import tempfile
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from .preprocess import Prepared

__all__ = ["ScanCache", "ScanMemory", "Summary"]

MEMORY_LIMIT = 2 * 2**30
"""Bytes of preprocessed scans that one site keeps in memory."""

_LOG = logging.getLogger(__name__)
_LENGTH_BYTES = 8
MAX_HEADER_BYTES = 2**16
"""Ours are a few hundred bytes; a damaged length must not fill the memory."""
_FAULTS = (OSError, SafetensorError, ValueError, KeyError, TypeError)


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
    """A folder of preprocessed scans; with ``folder=None`` it keeps nothing."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.problem = ""
        """Why entries are no longer written; empty while all is well."""

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
                return _summary(header["__metadata__"], tuple(header["image"]["shape"][1:]))
        except _FAULTS:
            return None

    def load(self, key: str) -> Prepared | None:
        """The scan, or None if there is no entry or its content does not match its check sum."""
        path = self.path(key)
        if path is None or not path.exists():
            return None
        try:
            # Read whole, not mapped: a mapped file that is cut off kills the process, and one that is changed
            # changes the scan after its check sum was tested.
            raw = path.read_bytes()
            tensors = load(raw)
            metadata = json.loads(raw[_LENGTH_BYTES : _LENGTH_BYTES + _header_bytes(raw)])["__metadata__"]
            if _checksum(tensors, metadata["spacing"], metadata["oriented"]) != metadata["sha256"]:
                raise ValueError("check sum differs")
            summary = _summary(metadata, tuple(tensors["image"].shape[1:]))
            return Prepared(tensors["image"], tensors.get("mask"), summary.spacing, summary.oriented)
        except _FAULTS as error:
            _LOG.warning("cache entry %s is damaged (%s); it is made again", path.name, error)
            return None

    def save(self, key: str, scan: Prepared) -> bool:
        """Write an entry atomically; False if the disk does not take it, with the reason in :attr:`problem`."""
        path = self.path(key)
        if path is None or self.problem:
            return False
        tensors = {"image": scan.image} | ({"mask": scan.mask} if scan.mask is not None else {})
        spacing, oriented = json.dumps(scan.spacing), json.dumps(scan.oriented)
        metadata = {"spacing": spacing, "oriented": oriented, "sha256": _checksum(tensors, spacing, oriented)}
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            _write(path, save(tensors, metadata))
        except OSError as error:
            self.problem = (
                f"cache {self.folder} cannot be written ({error.strerror or error}): scans are prepared "
                "again in every run; free some space, or give another folder"
            )
            _LOG.warning(self.problem)
            return False
        return True


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
        self.held += sum(scan.nbytes for scan in scans)
        while self.held > self.limit and len(self._scans) > 1:
            _, gone = self._scans.popitem(last=False)
            self.held -= sum(scan.nbytes for scan in gone)


def _header_bytes(head: bytes) -> int:
    """Length of safetensors' JSON header, which the first eight bytes hold."""
    return min(int.from_bytes(head[:_LENGTH_BYTES], "little"), MAX_HEADER_BYTES)


def _write(path: Path, content: bytes) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".new-")  # mode 0600
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
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
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()

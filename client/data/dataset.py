# SPDX-License-Identifier: Apache-2.0
"""The data set of one hospital, opened and checked: preprocessed scans by patient, and who trains.

Scans come from memory, else from the cache on disk, else from the hospital's files again. Made by
:func:`.opening.open_site`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ...privacy.errors import DataError
from ...privacy.study import Study
from .bids import ScanFiles
from .cache import ScanCache, ScanMemory
from .outcomes import Outcome
from .preprocess import Prepared, content_key, prepare
from .resample import forget_places
from .split import side_of

__all__ = ["Entry", "Scan", "SiteData"]


@dataclass(frozen=True)
class Scan:
    """One preprocessed scan, axes in RAS+ order."""

    image: torch.Tensor  # float32 (C, X, Y, Z)
    label: torch.Tensor  # int64 (X, Y, Z) for segmentation, else (): class, number (float32) or code of a time
    spacing: tuple[float, float, float] | None  # mm; None: unknown
    name: str


@dataclass(frozen=True, slots=True)
class Entry:
    """A checked scan: its files and its key in the cache."""

    files: ScanFiles
    key: str


class SiteData:
    """Checked scans of one hospital.

    Attributes:
        name: the site.
        patients: ids of the patients that can be used, sorted.
        excluded: patients that are left out (``data.missing_modality``), and why.
        classes: class of each patient (classification); else what the loss takes (:meth:`.outcomes.Outcome.label`).
        outcomes: of each patient (regression, survival).
    """

    def __init__(
        self,
        name: str,
        study: Study,
        entries: Mapping[str, Sequence[Entry]],
        cache: ScanCache,
        memory: ScanMemory,
        *,
        classes: Mapping[str, int | float],
        excluded: Mapping[str, str],
        warnings: Sequence[str],
        outcomes: Mapping[str, Outcome] | None = None,
    ) -> None:
        self.name = name
        self.patients = tuple(sorted(entries))
        self.excluded = dict(excluded)
        self.classes = dict(classes)
        self.outcomes = dict(outcomes or {})
        self._study, self._entries = study, entries
        self._cache, self._memory = cache, memory
        self._warnings = tuple(warnings)

    def add_warning(self, text: str) -> None:
        """Tell one more thing."""
        self._warnings += (text,)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a person at the hospital should know, though the study can go on."""
        return self._warnings + ((f"{self.name}: {self._cache.problem}",) if self._cache.problem else ())

    def kept(self) -> tuple[int, int]:
        """Scans that the cache on disk holds, and scans in all."""
        keys = [entry.key for entries in self._entries.values() for entry in entries]
        paths = [path for key in keys if (path := self._cache.path(key)) is not None]
        return sum(path.is_file() for path in paths), len(keys)

    def training(self) -> tuple[str, ...]:
        """Patients that train, by keyed hash of their id."""
        return self._side("train")

    def validation(self) -> tuple[str, ...]:
        """Patients that only validate. A held-out site evaluates all :attr:`patients` instead."""
        return self._side("validation")

    def _side(self, side: str) -> tuple[str, ...]:
        key, share = self._study.data.split_key, self._study.evaluation.validation_fraction
        return tuple(p for p in self.patients if side_of(p, key, share) == side)

    def scans(self, patient: str) -> tuple[Scan, ...]:
        """All scans of one patient, preprocessed. Do not write into their tensors: images are shared.

        Raises:
            DataError: a file was changed or removed since the data set was opened.
        """
        return tuple(
            Scan(
                image=scan.image,
                label=torch.tensor(self.classes[patient]) if scan.mask is None else scan.mask.to(torch.int64),
                spacing=scan.spacing,
                name=entry.files.name,
            )
            for scan, entry in zip(self.prepared(patient), self._entries[patient], strict=True)
        )

    def prepared(self, patient: str) -> tuple[Prepared, ...]:
        """The scans in the compact form that is kept; as :meth:`scans` otherwise."""
        scans = self._memory.get(patient)
        if scans is None:
            scans = tuple(self._fetch(entry) for entry in self._entries[patient])
            self._memory.put(patient, scans)
        return scans

    def _fetch(self, entry: Entry) -> Prepared:
        scan = self._cache.load(entry.key)
        if scan is None:
            if content_key(entry.files, self._study) != entry.key:
                raise DataError(
                    f"{self.name}: {entry.files.name}: a file changed after the data set was opened; expected it to "
                    "stay as it was checked; start again"
                )
            scan = prepare(entry.files, self._study)
            forget_places()  # this process trains, and has other use for the memory
            if self._cache.save(entry.key, scan):
                scan = self._cache.load(entry.key) or scan  # mapped, so that it takes no memory of its own
        return scan

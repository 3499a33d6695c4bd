# SPDX-License-Identifier: Apache-2.0
"""Opens the data set of one hospital: finds its scans, checks every file, fills the cache.

A scan that the cache holds was checked when it was made, so a second opening only hashes files. All faults of
the data set are told in one error. Nothing that is found here leaves the hospital.

Steps: 1 patients and table, 2 files of each patient, 3 their content, 4 the data set as a whole.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from ...privacy.errors import DataError
from ...privacy.study import Study
from . import checks
from .bids import ScanFiles, find_patients, find_scans, read_participants
from .build import Built, Progress, build_entries
from .cache import LIMIT, ScanCache, ScanMemory, Summary
from .dataset import Entry, SiteData
from .outcomes import Outcome, check_columns, outcome_of
from .preprocess import Prepared, content_key, prepare
from .resample import forget_places

__all__ = ["AXES", "open_site"]

AXES = {"sagittal": 0, "coronal": 1, "axial": 2}
"""Axis across which slices are taken, in RAS+ order."""

Table = Mapping[str, Mapping[str, str]]


def open_site(
    path: Path,
    study: Study,
    *,
    cache: Path | None = None,
    site: str | None = None,
    limit: int = LIMIT,
    workers: int = 1,
    progress: Progress | None = None,
) -> SiteData:
    """Open, check and preprocess the data set of one hospital.

    Args:
        path: BIDS folder.
        study: says what the data set must hold.
        cache: folder of preprocessed scans, made if need be; None: memory only.
        site: the site's name in messages and in ``evaluation.heldout``; None: the folder's name.
        limit: bytes that the cache may take on disk.
        workers: processes that fill the cache; 1: this one alone.
        progress: told of each scan that several processes prepared.

    Raises:
        DataError: with one line per fault.
        EnvironmentProblem: a package that the study's preprocessing needs is missing, or a process died.
    """
    opening = _Opening(site or path.resolve().name, path, study, ScanCache(cache, limit))
    opening.read(workers, progress)
    return opening.result()


class _Opening:
    def __init__(self, name: str, root: Path, study: Study, cache: ScanCache) -> None:
        self.name, self.root, self.study, self.cache = name, root, study, cache
        self.mask = study.task.mask if study.task.kind == "segmentation" else None
        self.faults = checks.Faults(name)
        self.memory = ScanMemory()
        self.table: Table | None = None
        self.entries: dict[str, list[Entry]] = {}
        self.summaries: dict[str, list[Summary]] = {}
        self.classes: dict[str, int | float] = {}
        self.outcomes: dict[str, Outcome] = {}
        self.excluded: dict[str, str] = {}
        self.filled: dict[str, str] = {}
        self.built: dict[ScanFiles, Built] = {}
        table = study.data.preprocessing
        self.brain = table.mask_name if table.mask == "supplied" else None

    def read(self, workers: int, progress: Progress | None) -> None:
        # 1. A data set without patients ends here; a bad table is one fault among others.
        try:
            patients = find_patients(self.root)
        except DataError as error:
            self.faults.add(error)
            self.faults.raise_if_any()
            raise
        try:
            self.table = read_participants(self.root)
            if self.mask is None:
                self.table = check_columns(self.table, self.study.task)
        except DataError as error:
            self.table = None
            self.faults.add(error)
        if workers > 1 and self.cache.folder is not None:
            self._build(patients, self.cache.folder, workers, progress)
        for patient in patients:
            try:
                self._patient(patient)
            except DataError as error:
                self.faults.add(error, patient)
        forget_places()
        self.faults.raise_if_any()

    def _build(self, patients: Sequence[str], folder: Path, workers: int, progress: Progress | None) -> None:
        """Step 3 beforehand, in several processes, for all scans that step 2 will let through."""
        jobs = []
        for patient in patients:
            with suppress(DataError):  # told in step 2
                scans = self._find(patient)
                lacking = checks.missing_modalities(scans, self.study.data.modalities)
                if not lacking or self.study.data.missing_modality == "zero":
                    jobs += [files for files in scans if files.mask or not self.mask]
        self.built = build_entries(
            jobs, self.study, folder, limit=self.cache.limit, since=self.cache.since, workers=workers, progress=progress
        )

    def _find(self, patient: str) -> list[ScanFiles]:
        return find_scans(self.root, patient, self.study.data.modalities, self.mask, self.brain)

    def _patient(self, patient: str) -> None:
        # 2. Which files there are.
        data, task = self.study.data, self.study.task
        scans = self._find(patient)
        lacking = checks.missing_modalities(scans, data.modalities)
        if lacking:
            if data.missing_modality == "refuse":
                raise DataError(checks.missing_line(patient, lacking))
            if data.missing_modality == "exclude" or not scans:
                self.excluded[patient] = f"no {' and no '.join(lacking)}"
                return
            self.filled[patient] = ", ".join(lacking)
        if self.mask is None and self.table is not None:
            if task.kind == "classification":
                self.classes[patient] = checks.class_of(self.table, patient, task.target, task.labels)
            else:
                self.outcomes[patient] = outcome_of(self.table, patient, task)
                self.classes[patient] = self.outcomes[patient].label(task)
        # 3. What they hold. Each scan may show a fault of its own.
        fresh: list[Prepared] = []
        for files in scans:
            try:
                self._scan(files, fresh)
            except DataError as error:
                self.faults.add(error, patient)
        if len(fresh) == len(scans):
            self.memory.put(patient, tuple(fresh))

    def _scan(self, files: ScanFiles, fresh: list[Prepared]) -> None:
        if self.mask:
            checks.check_has_mask(files, self.mask)
        key, summary = self._summary(files, fresh)
        if self.study.model.dims == 2:
            checks.check_slices(files.name, summary.shape, AXES[self.study.data.slice_axis])
        self.entries.setdefault(files.patient, []).append(Entry(files, key))
        self.summaries.setdefault(files.patient, []).append(summary)

    def _summary(self, files: ScanFiles, fresh: list[Prepared]) -> tuple[str, Summary]:
        built = self.built.get(files)
        if isinstance(built, DataError):
            raise built
        key = built[0] if built else content_key(files, self.study)
        summary = self.cache.summary(key) or (built[1] if built else None)
        if summary is None:
            scan = prepare(files, self.study)
            summary = Summary.of(scan)
            if not self.cache.save(key, scan):
                fresh.append(scan)
        return key, summary

    def result(self) -> SiteData:
        # 4. The data set as a whole.
        if not self.entries:
            patient, why = next(iter(self.excluded.items()))
            raise DataError(
                f"{self.name}: all {len(self.excluded)} patients are left out ({patient}: {why}); expected at least "
                "one; name modalities that the hospital has in data.modalities"
            )
        site = SiteData(
            self.name,
            self.study,
            self.entries,
            self.cache,
            self.memory,
            classes=self.classes,
            excluded=self.excluded,
            warnings=[f"{self.name}: {text}" for text in self._warnings()],
            outcomes=self.outcomes,
        )
        if self.name in self.study.evaluation.heldout:
            return site
        checks.check_can_train(self.name, len(site.patients), len(site.training()))
        if not site.validation():
            site.add_warning(
                f"{self.name}: none of {len(site.patients)} patients validates; expected about a share of "
                "evaluation.validation_fraction; raise it, or the site takes no part in choosing the round"
            )
        return site

    def _warnings(self) -> list[str]:
        texts = []
        total = len(self.entries)
        if self.excluded:
            texts.append(f"{len(self.excluded)} patients left out: {_few(self.excluded)}")
        if self.filled:
            texts.append(
                f"{len(self.filled)} of {total} patients get zeros for a missing modality: {_few(self.filled)}"
            )
        unknown = sum(any(s.spacing is None for s in scans) for scans in self.summaries.values())
        if unknown and self.mask:
            texts.append(
                f"voxel size unknown for {unknown} of {total} patients (no unit in the header): no distances in mm"
            )
        adrift = sum(any(not s.oriented for s in scans) for scans in self.summaries.values())
        if adrift:
            texts.append(
                f"orientation not stated for {adrift} of {total} patients (sform and qform codes 0): "
                "NIfTI's default taken"
            )
        holders = defaultdict(set)
        for patient, entries in self.entries.items():
            for entry in entries:
                holders[entry.key].add(patient)
        texts.extend(
            f"{' and '.join(sorted(same)[:3])} hold the same files: one patient under two ids may train and validate"
            for same in holders.values()
            if len(same) > 1
        )
        if self.table is not None:
            for what, ids in (
                (
                    "have a row in participants.tsv but no folder",
                    set(self.table) - set(self.entries) - set(self.excluded),
                ),
                ("have a folder but no row in participants.tsv", set(self.entries) - set(self.table)),
            ):
                if ids:
                    texts.append(f"{len(ids)} patients {what}: {', '.join(sorted(ids)[:3])}")
        return texts


def _few(reasons: Mapping[str, str]) -> str:
    shown = [f"{patient} ({why})" for patient, why in list(reasons.items())[:3]]
    return ", ".join(shown) + (", …" if len(reasons) > len(shown) else "")

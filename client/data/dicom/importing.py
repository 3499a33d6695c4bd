# SPDX-License-Identifier: Apache-2.0
"""``import dicom``: a PACS export in, a BIDS folder out, nothing in it that says who, where or when.

Steps: 1 find the objects and sort them into series; 2 propose a name for each, or take the one of the mapping file;
3 convert one series after the other into a hidden folder beside the results; 4 look for identifying values in
everything that was written; 5 put the files in their places, and the table, the mapping and the record beside them.
A fault in one series is written down and the rest goes on. What is found in the target is complete at every moment:
files are renamed into place, and a second run with a corrected mapping removes what the first one wrote under other
names. Faces are not removed unless a defacing command is given.
"""

import fcntl
import hashlib
import json
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from ....privacy.errors import BadInput, DataError, EnvironmentProblem, StateError
from . import regions
from .convert import convert, save_nifti, write_clean
from .geometry import Tilted
from .headers import find_instances, identifying_values
from .identity import Pseudonyms, remains
from .layout import README, Runs, load_record, other_rows, participants_table
from .mapping import TAKEN, Row, as_table, read_mapping
from .naming import Name, propose
from .series import Series, group, reference_stack
from .sidecar import free_text, side_car

__all__ = ["Summary", "import_dicom"]

MAPPING: Final = Path("code", "dicom_mapping.tsv")
RECORD: Final = Path("code", "dicom_import.json")
_LOCK: Final = ".import.lock"
_STAGE: Final = ".import-"
_DERIVED: Final = Path("derivatives", "manual")

Progress = Callable[[int, int], None]
"""Called after each series with the number done and the number in all."""


@dataclass
class Summary:
    """What an import did; paths are relative to the target."""

    imported: dict[str, list[str]] = field(default_factory=dict)  # series: files
    skipped: dict[str, str] = field(default_factory=dict)  # series: why
    refused: dict[str, str] = field(default_factory=dict)  # series: why
    passed: dict[str, str] = field(default_factory=dict)  # files that are no readable DICOM objects: why
    rows: list[Row] = field(default_factory=list)
    worst_mm: float = 0.0
    patients: int = 0


def import_dicom(
    source: Path,
    out: Path,
    keys: Path,
    *,
    mapping: Path | None = None,
    dry_run: bool = False,
    deface: str = "",
    progress: Progress | None = None,
) -> Summary:
    """Convert a folder of DICOM objects into a BIDS data set.

    Args:
        source: folder, read only.
        out: the data set; new, empty, or made by an earlier import.
        keys: the node's private folder with the pseudonym key; outside ``out`` and ``source``.
        mapping: edited mapping file of an earlier run.
        dry_run: write the mapping file only.
        deface: command with ``{in}`` and ``{out}`` that removes faces from anatomical images; empty: they stay.
        progress: told of each series.

    Raises:
        DataError: no DICOM object, or a fault in the mapping file.
        BadInput: folders inside each other, or a defacing command without ``{in}`` and ``{out}``.
        StateError: the target holds something else, or another import runs in it.
        EnvironmentProblem: the target cannot be written, or a program is missing.
    """
    _check_places(source, out, keys, deface)
    instances, passed = find_instances(source)
    chosen = read_mapping(mapping) if mapping else {}
    run = _Import(out, Pseudonyms(keys), chosen, deface)
    run.summary.passed = passed
    with _target(out):
        found = group(instances)
        for number, series in enumerate(found, 1):
            run.plan(series)
            if progress and dry_run:
                progress(number, len(found))
        if not dry_run:
            images = [s for s in found if s.kind == "image"]
            drawn = [s for s in found if s.kind in ("segmentation", "structures")]
            for number, series in enumerate([*images, *drawn], 1):
                run.take(series)
                if progress:
                    progress(number, len(images) + len(drawn))
        run.finish(dry_run=dry_run)
    return run.summary


def _check_places(source: Path, out: Path, keys: Path, deface: str) -> None:
    places = {"SRC": source.resolve(), "--out": out.resolve(), "--keys": keys.resolve()}
    for name, path in places.items():
        for other, folder in places.items():
            if name != other and path.is_relative_to(folder):
                raise BadInput(f"{name} {path} lies in {other} {folder}; expected three separate folders; move one")
    if deface and not ("{in}" in deface and "{out}" in deface):
        raise BadInput(f"--deface {deface!r}: expected a command with {{in}} and {{out}}")


@contextmanager
def _target(out: Path) -> Iterator[None]:
    """The target folder, ours alone while it lasts; what a killed import left behind is removed first."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        if any(out.iterdir()) and not (out / RECORD).exists() and not (out / _LOCK).exists():
            raise StateError(
                f"{out} holds files that no import wrote; expected a new folder or an earlier import; give another"
            )
        with (out / _LOCK).open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise StateError(f"{out}: another import is writing there; wait for it to end") from error
            for left in out.glob(f"{_STAGE}*"):
                shutil.rmtree(left, ignore_errors=True)
            yield
        if (out / RECORD).exists():
            (out / _LOCK).unlink(missing_ok=True)
    except OSError as error:
        raise EnvironmentProblem(
            f"{out}: cannot be written ({error.strerror or error}); free some space, or give a folder that the "
            "node's account may write"
        ) from error


class _Import:
    def __init__(self, out: Path, names: Pseudonyms, chosen: Mapping[str, Row], deface: str) -> None:
        self.out, self.names, self.chosen, self.deface = out, names, chosen, deface
        self.summary = Summary()
        self.rows: dict[str, Row] = {}
        self.images: dict[str, tuple[str, Any, tuple[int, ...]]] = {}  # series UID: stem, affine, shape
        self.record: dict[str, Any] = load_record(out / RECORD)
        self.runs = Runs(self.record)

    # -- what each series shall become

    def plan(self, series: Series) -> None:
        key = self.key(series)
        first = series.first
        patient = "sub-" + self.names.name("patient", *series.patient)
        session = "ses-" + self.names.name("session", first.text("StudyInstanceUID"), length=6)
        name, reason, size, action, tilted = Name(), series.reason, "", "skip", False
        try:
            if series.kind == "image":
                stack, (columns, rows) = reference_stack(series)
                size = f"{columns}x{rows}x{stack.slices}" + (f"x{stack.volumes}" if stack.volumes > 1 else "")
                name = propose(series, stack.volumes)
                action, reason = ("import", name.why) if name.suffix else ("skip", name.why)
            elif series.kind != "skip":
                found = regions.region_names(series)
                words = [regions.label_of(free_text(n, series), i) for i, n in enumerate(found, 1)]
                name = Name("anat", "_".join(f"label-{word}" for word in words), "mask", "")
                action, reason = "import", f"{len(words)} drawn regions"
        except Tilted as error:
            name, action, reason, tilted = propose(series, 1), "refused", str(error), True
        except DataError as error:
            action, reason = "refused", str(error)
        row = Row(
            series=key, patient=patient, session=session, action=action, datatype=name.datatype,
            entities=name.entities, suffix=name.suffix, reason=reason,
            description=free_text(first.text("SeriesDescription") or first.text("ProtocolName"), series),
            scanner=free_text(f"{first.text('Manufacturer')} {first.text('ManufacturerModelName')}", series),
            objects=str(len(series.instances)), size=size,
        )  # fmt: skip
        edited = self.chosen.get(key)
        if edited is not None:
            if edited.action in TAKEN and action == "refused" and not (tilted and edited.action == "straighten"):
                pass  # a wish does not mend a stack
            elif edited.action in TAKEN and series.kind == "skip":
                row = replace(row, reason=f"{reason}; cannot be imported")
            else:
                row = replace(
                    row, action=edited.action, datatype=edited.datatype, entities=edited.entities, suffix=edited.suffix,
                    reason="mapping file" if edited.action in TAKEN else edited.reason or "mapping file",
                )  # fmt: skip
        self.rows[key] = row

    def key(self, series: Series) -> str:
        return self.names.name("series", series.uid, series.kind, length=12)

    # -- conversion of one series

    def take(self, series: Series) -> None:
        key = self.key(series)
        row = self.rows[key]
        if row.action not in TAKEN:
            return
        stage = Path(tempfile.mkdtemp(prefix=_STAGE, dir=self.out))
        try:
            written = self._image(series, row, stage) if series.kind == "image" else self._regions(series, row, stage)
            _look_for_identity(stage / "files", series)
            places = {}
            for path in written:
                target = self.out / path.relative_to(stage / "files")
                target.parent.mkdir(parents=True, exist_ok=True)
                places[target.relative_to(self.out).as_posix()] = hashlib.sha256(path.read_bytes()).hexdigest()
                path.replace(target)
            for old in set(self.record.get(key, {})) - set(places):
                (self.out / old).unlink(missing_ok=True)
            self.record[key] = places
            self.summary.imported[key] = sorted(places)
        except DataError as error:
            self.rows[key] = replace(row, action="refused", reason=str(error))
        finally:
            shutil.rmtree(stage, ignore_errors=True)

    def _image(self, series: Series, row: Row, stage: Path) -> list[Path]:
        work = stage / "work"
        work.mkdir()
        volumes = convert(series, work, straighten=row.action == "straighten")
        written = []
        for volume in volumes:
            self.summary.worst_mm = max(self.summary.worst_mm, volume.error_mm)
            suffix = "magnitude" if row.suffix == "fieldmap" and not volume.map_hz and len(volumes) > 1 else row.suffix
            parts = (row.entities, "" if row.datatype == "fmap" else volume.entities)
            entities = "_".join(filter(None, parts))
            if volume.voxels.ndim == 4 and row.datatype == "anat":
                raise DataError(
                    f"{volume.voxels.shape[3]} volumes in one series, and {row.suffix} is one; set datatype func or "
                    "dwi in the mapping file, or skip the series"
                )
            stem = self.runs.stem(self.key(series), row, entities, suffix)
            path = stage / "files" / row.patient / row.session / row.datatype / f"{stem}.nii.gz"
            write_clean(path, volume)
            if self.deface and row.datatype == "anat":
                _deface(self.deface, path, work)
            written.append(path)
            extra = {".json": json.dumps(side_car(series, volume), indent=2) + "\n"}
            if row.datatype == "dwi" and volume.bval:
                extra |= {".bval": volume.bval, ".bvec": volume.bvec}
            for end, text in extra.items():
                path.with_name(stem + end).write_text(text, encoding="utf-8")
                written.append(path.with_name(stem + end))
            if not volume.entities or volume is volumes[0]:
                place = f"{row.patient}/{row.session}/{row.datatype}/{stem.removesuffix('_' + suffix)}"
                shape = tuple(int(n) for n in volume.voxels.shape[:3])
                self.images[series.first.text("SeriesInstanceUID")] = (place, volume.affine, shape)
        return written

    def _regions(self, series: Series, row: Row, stage: Path) -> list[Path]:
        import nibabel

        below = [self.images[uid] for uid in regions.referenced_series(series) if uid in self.images]
        if not below:
            raise DataError("drawn on a series that was not imported; import that series too, or skip the regions")
        place, affine, shape = below[0]
        masks = regions.read_regions(series, affine, shape)
        labels = row.entities.split("_")
        if len(labels) != len(masks):
            raise DataError(
                f"entities {row.entities!r} name {len(labels)} regions; expected one label-… for each of {len(masks)}"
            )
        written = []
        for label, mask in zip(labels, masks, strict=True):
            image: Any = nibabel.Nifti1Image(mask, affine)  # type: ignore[no-untyped-call]
            image.header.set_xyzt_units("mm", "sec")
            stem = f"{place}_{label}"
            path = stage / "files" / _DERIVED / f"{stem}_{row.suffix}.nii.gz"
            if path.exists() or self.runs.taken(path.name.split(".")[0], self.key(series)):
                raise DataError(f"{path.name}: two regions of one name; give each its own label in the mapping file")
            save_nifti(path, image)
            written.append(path)
        return written

    # -- tables

    def finish(self, *, dry_run: bool) -> None:
        summary = self.summary
        summary.rows = list(self.rows.values())
        for key, row in self.rows.items():
            if row.action == "skip":
                summary.skipped[key] = row.reason
            elif row.action == "refused":
                summary.refused[key] = row.reason
            if row.action == "skip" and not dry_run:  # what was once imported and is refused now stays as it was
                for old in self.record.pop(key, {}):
                    (self.out / old).unlink(missing_ok=True)
        self._write(MAPPING, as_table([*summary.rows, *other_rows(self.out / MAPPING, self.rows)]))
        self._write(RECORD, json.dumps(self.record, indent=1, sort_keys=True) + "\n")
        patients = sorted({path.split("/")[0] for files in self.record.values() for path in files} - {"derivatives"})
        summary.patients = len(patients)
        if not dry_run:
            self._write(Path("participants.tsv"), participants_table(self.out, patients))
            description = {
                "Name": "Imported from DICOM",
                "BIDSVersion": "1.10.0",
                "DatasetType": "raw",
                "GeneratedBy": [{"Name": "FedNeuro", "Description": "fedneuro-node data import dicom"}],
            }
            self._write(Path("dataset_description.json"), json.dumps(description, indent=2) + "\n")
            self._write(Path("README"), README)
            self._write(Path(".bidsignore"), "code/\n**/*_CT.*\n")
            if any(path.startswith("derivatives/") for files in self.record.values() for path in files):
                manual = description | {"Name": "Drawn regions", "DatasetType": "derivative"}
                self._write(_DERIVED / "dataset_description.json", json.dumps(manual, indent=2) + "\n")
        for folder in sorted((p for p in self.out.rglob("*") if p.is_dir()), reverse=True):
            if not any(folder.iterdir()):
                folder.rmdir()

    def _write(self, path: Path, text: str) -> None:
        target = self.out / path
        target.parent.mkdir(parents=True, exist_ok=True)
        fresh = target.with_name(f".{target.name}.new")
        fresh.write_text(text, encoding="utf-8")
        fresh.replace(target)


def _look_for_identity(folder: Path, series: Series) -> None:
    import gzip

    values = {value for instance in series.instances for value in identifying_values(instance, parts=False)}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        if path.suffix == ".gz":
            with gzip.open(path) as file:
                content = file.read(352)
        else:
            content = path.read_bytes()
        if remains(content, values):
            raise DataError(
                f"{path.name.split('.', 1)[-1]} file: an identifying value of the headers would have been written; "
                "nothing of this series was kept; report this"
            )


def _deface(command: str, path: Path, work: Path) -> None:
    fresh = work / "defaced.nii.gz"
    words = [w.replace("{in}", str(path)).replace("{out}", str(fresh)) for w in shlex.split(command)]
    try:
        done = subprocess.run(words, capture_output=True, check=False, timeout=3600)  # noqa: S603 - the hospital's own command
    except (OSError, subprocess.TimeoutExpired) as error:
        raise EnvironmentProblem(f"--deface: {words[0]} cannot be run ({error}); install it or correct it") from error
    if done.returncode or not fresh.exists():
        raise DataError(f"--deface: {words[0]} ended with code {done.returncode} and left no image; not imported")
    fresh.replace(path)

# SPDX-License-Identifier: Apache-2.0
"""``fedneuro-node data``: from the hospital's scans to a data set that can be trusted. Nothing here leaves."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..privacy.errors import DataError, EnvironmentProblem
from .cli_policy import Signature, read_signature, read_study

if TYPE_CHECKING:
    from .data.dicom import Summary
    from .data.quality import Report
    from .data.register import Registered

__all__ = ["app"]

app = typer.Typer(help="Import, register, check, describe and prepare data sets; nothing leaves.", no_args_is_help=True)
imports = typer.Typer(help="Turn what the hospital has into a BIDS folder.", no_args_is_help=True)
app.add_typer(imports, name="import")

State = Annotated[
    Path, typer.Option("--state", envvar="FEDNEURO_STATE", help="The node's private folder: keys and register.")
]
StateIfAny = Annotated[Path | None, typer.Option("--state", envvar="FEDNEURO_STATE", help="The node's private folder.")]
DataSet = Annotated[str, typer.Argument(metavar="NAME|PATH", help="A registered data set, or a BIDS folder.")]
Out = Annotated[Path, typer.Option("--out", help="BIDS folder to write; new, empty, or of an earlier import.")]


@imports.command()
def dicom(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="Folder of a PACS export; only read.")],
    out: Out,
    state: State,
    mapping: Annotated[
        Path | None, typer.Option("--mapping", help="Edited mapping file (code/dicom_mapping.tsv of an earlier run).")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Write the mapping file only.")] = False,
    deface: Annotated[
        str, typer.Option("--deface", metavar="COMMAND", help="Removes faces; holds {in} and {out}. Default: off.")
    ] = "",
) -> None:
    """Convert DICOM series to BIDS, under pseudonyms and without dates. Exit code 2 if a series was refused."""
    from .data.dicom import import_dicom

    with _progress("importing") as progress:
        summary = import_dicom(source, out, state, mapping=mapping, dry_run=dry_run, deface=deface, progress=progress)
    _tell(summary, out, dry_run=dry_run, defaced=bool(deface))


@imports.command()
def images(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="Folder of 2D pictures, or of nnU-Net's raw layout.")],
    out: Out,
    state: State,
    table: Annotated[
        Path | None, typer.Option("--table", help="CSV with a row per picture. Default: SRC is in nnU-Net's layout.")
    ] = None,
    patient: Annotated[str, typer.Option("--patient", help="Column that says whose picture it is.")] = "patient",
    target: Annotated[str, typer.Option("--target", help="Column of the class.")] = "class",
    file: Annotated[str, typer.Option("--file", help="Column of the picture's path.")] = "file",
    suffix: Annotated[str, typer.Option("--suffix", help="BIDS suffix of the pictures.")] = "T1w",
    size: Annotated[int, typer.Option("--size", help="Side in pixels.")] = 128,
) -> None:
    """Convert 2D pictures with a table, or nnU-Net's raw layout, to BIDS under pseudonyms."""
    from .data.foreign import import_images, import_nnunet

    if table is None:
        found = import_nnunet(source, out, state)
    else:
        found = import_images(
            source, table, out, state, patient=patient, target=target, file=file, suffix=suffix, size=size
        )
    for name, why in list(found.faults.items())[:10]:
        print(f"failed   {name}: {why}")
    if len(found.faults) > 10:
        print(f"failed   … and {len(found.faults) - 10} more files")
    print(f"{found.patients} patients imported to {out}, {len(found.faults)} files failed")
    if found.faults:
        raise DataError(
            f"{len(found.faults)} files failed; the others are complete; mend those, and import into a new folder, or "
            "go on without them"
        )


@imports.command()
def table(
    source: Annotated[Path, typer.Argument(metavar="TABLE", help="CSV or TSV with a header.")],
    out: Annotated[Path, typer.Option("--out", help="BIDS folder whose participants.tsv gets the columns.")],
    column: Annotated[list[str], typer.Option("--column", help="Column to take over; may repeat. No other is.")],
    patient: Annotated[str, typer.Option("--patient", help="Column of the patient.")] = "participant_id",
    state: Annotated[
        Path | None,
        typer.Option("--state", envvar="FEDNEURO_STATE", help="The node's folder, where rows hold hospital numbers."),
    ] = None,
) -> None:
    """Take outcome columns over into participants.tsv, such as FeTS partitions or a grade."""
    from .data.foreign import import_table

    matched, lost = import_table(source, out, state, patient=patient, columns=column)
    print(f"{matched} patients got {', '.join(column)}; {lost} rows fit no patient of {out}")


def _tell(summary: "Summary", out: Path, *, dry_run: bool, defaced: bool) -> None:
    from .data.dicom.mapping import TAKEN

    for row in summary.rows:
        where = f"{row.patient}/{row.session}"
        what = f"{row.datatype}/{'_'.join(filter(None, (row.entities, row.suffix)))}" if row.action in TAKEN else ""
        print(f"{row.action:8} {row.series} {where} {what or row.reason}".rstrip())
    for path, why in list(summary.passed.items())[:10]:
        print(f"passed   {path}: {why}")
    if len(summary.passed) > 10:
        print(f"passed   … and {len(summary.passed) - 10} more files")
    done = "proposed" if dry_run else "imported"
    number = sum(row.action in TAKEN for row in summary.rows)
    patients = len({row.patient for row in summary.rows if row.action in TAKEN})
    rest = f"{len(summary.skipped)} skipped, {len(summary.refused)} refused, {len(summary.passed)} files passed over"
    print(f"{number} series {done} of {patients} patients, {rest}")
    print(f"to change that: edit {out / 'code' / 'dicom_mapping.tsv'} and run again with --mapping")
    if not dry_run and not defaced:
        print("faces were not removed (--deface): treat the images as identifying")
    if summary.refused:
        raise DataError(
            f"{len(summary.refused)} series refused; the others are complete; settle them, or set action to skip in "
            "the mapping file"
        )


@app.command()
def register(
    name: Annotated[str, typer.Argument(help="Name of the data set at this node.")],
    path: Annotated[Path, typer.Argument(help="BIDS folder.")],
    state: State,
    public_size: Annotated[
        int | None, typer.Option("--public-size", help="The only size that is told. Default: rounded to 5.")
    ] = None,
    licence: Annotated[str, typer.Option("--licence", help="Terms of use, for the register.")] = "",
    consent: Annotated[str, typer.Option("--consent", help="Ground on which the data are used.")] = "",
    role: Annotated[list[str] | None, typer.Option("--role", help="train (default) or heldout; may repeat.")] = None,
    update: Annotated[bool, typer.Option("--update", help="Enter the new state of a registered data set.")] = False,
) -> None:
    """Enter a data set with a fingerprint of its content; later changes are noticed and named."""
    from ..privacy.contract import Role
    from ..privacy.errors import BadInput
    from .data.register import register as enter

    try:
        roles = tuple(Role(word) for word in role or [])
    except ValueError as error:
        raise BadInput(f"--role {', '.join(role or [])}: expected train or heldout") from error
    entry = enter(state, name, path, size=public_size, licence=licence, consent=consent, roles=roles, update=update)
    print(f"{entry.name}: {entry.patients} patients, {len(entry.files)} files, public size {entry.public_size}")
    print(f"fingerprint {entry.fingerprint}")


@app.command(name="list")
def list_entries(state: State) -> None:
    """Show the registered data sets and whether their folders are as they were. Exit code 2 if one changed."""
    from .data.register import changes_of, list_registered

    changed = []
    for entry in list_registered(state):
        try:
            lines = changes_of(entry).lines()
        except DataError as error:
            lines = [str(error)]
        words = "unchanged" if not lines else "CHANGED"
        roles = ", ".join(entry.roles)
        print(f"{entry.name}: {words}, public size {entry.public_size}, {roles}, {entry.fingerprint[:12]}")
        for line in lines:
            print(f"  {line}")
        if lines:
            changed.append(entry.name)
    if changed:
        raise DataError(f"{', '.join(changed)} changed since registration; check it, then register it with --update")


@app.command()
def check(
    data: DataSet,
    state: StateIfAny = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder of the report. Default: state/checks/NAME, or none.")
    ] = None,
    study: Annotated[
        Path | None, typer.Option("--study", help="Study file: leaks across its split are looked for.")
    ] = None,
    pictures: Annotated[int, typer.Option("--pictures", min=0, help="Scans that the report shows.")] = 12,
) -> None:
    """Look for faults in a data set: page and JSON, which stay here. Exit code 2 if it may not join."""
    from ..privacy.study_file import load_study
    from .data.quality import check_data
    from .data.quality.page import render_page, write_text
    from .data.register import changes_of

    path, name, changes = Path(data), "", []
    if (entry := _registered(data, state)) is not None and state is not None:
        path, name, changes = Path(entry.path), entry.name, changes_of(entry).lines()
        out = out or state / "checks" / name
    loaded = load_study(study, []) if study else None
    split = (loaded.data.split_key, loaded.evaluation.validation_fraction) if loaded else None
    with _progress("checking") as progress:
        report = check_data(
            path, name=name, split=split, pictures=pictures if out else 0, changes=changes, progress=progress
        )
    if out:
        write_text(out / "report.html", render_page(report))
        write_text(out / "report.json", json.dumps(report.to_json(), indent=1) + "\n")
        print(f"report: {out / 'report.html'}")
    _verdict(report, "see the report" if out else "with --out FOLDER there is a report with pictures")


@app.command()
def stats(
    data: DataSet,
    state: StateIfAny = None,
    json_out: Annotated[Path | None, typer.Option("--json", help="Also write the figures; they stay here.")] = None,
    release: Annotated[
        Path | None, typer.Option("--release", help="Write the little that may be handed over to the coordinator.")
    ] = None,
    site: Annotated[str, typer.Option("--site", help="Name in the released file. Default: of the data set.")] = "",
    study: Annotated[
        Path | None, typer.Option("--study", help="Study that the release is for; where it is private, noise is added.")
    ] = None,
    threshold: Annotated[int, typer.Option("--threshold", min=5, help="Patients that a released group must have.")] = 5,
    epsilon: Annotated[
        float, typer.Option("--epsilon", min=0, help="Private study: what the release may cost each patient.")
    ] = 0.0,
    config: Annotated[
        Path | None, typer.Option("--config", help="node.toml: its policy permits the release, its key signs it.")
    ] = None,
    signature: Signature = None,
) -> None:
    """Show what a data set holds: counts, labels, volumes, grey values, geometry. Nothing leaves."""
    from ..privacy.errors import BadInput
    from .cli_statistics import make_release, node_of
    from .data.quality.page import write_text
    from .data.statistics import measure, summary

    path, name = _place(data, state)
    loaded = read_study(study, None) if study else None
    if (epsilon or config or signature or site) and release is None:
        raise BadInput("--epsilon, --config, --signature and --site belong to a --release; leave them out")
    signed = read_signature(signature) if signature else b""
    settings = None
    if release:
        settings = node_of(path, loaded, config, epsilon=epsilon, threshold=threshold, site=site, signature=signed)
    with _progress("reading") as progress:
        found = measure(path, progress)
    shown = summary(found)
    print(json.dumps(shown, indent=1, ensure_ascii=False))
    if json_out:
        write_text(json_out, json.dumps(shown, indent=1) + "\n")
    if release:
        text, lines = make_release(
            found, settings, loaded, name=site or name, epsilon=epsilon, threshold=threshold, signature=signed
        )
        write_text(release, text)
        print("\n".join([*lines, f"to hand over, after you have read it: {release}"]))


@app.command()
def prepare(
    data: DataSet,
    study: Annotated[Path, typer.Option("--study", help="Study file: its preprocessing is applied.")],
    state: StateIfAny = None,
    cache: Annotated[Path | None, typer.Option("--cache", help="Folder of the cache. Default: state/cache.")] = None,
    workers: Annotated[int, typer.Option("--workers", min=1, max=256, help="Processes.")] = 2,
    cache_gib: Annotated[float, typer.Option("--cache-gib", min=0.001, help="Space that the cache may take.")] = 64.0,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override a key; may repeat.")
    ] = None,
) -> None:
    """Preprocess a data set ahead of a study, so that its first round need not wait. Goes on where it was stopped."""
    from ..privacy.errors import BadInput
    from ..privacy.study_file import load_study
    from .data.opening import open_site

    path, name = _place(data, state)
    place = cache or (state / "cache" if state else None)
    if place is None:
        raise BadInput("no place for the cache; give --cache, or the node's --state")
    loaded = load_study(study, overrides or [])
    with _progress("preparing") as progress:
        opened = open_site(
            path, loaded, cache=place, site=name, limit=int(cache_gib * 2**30), workers=workers, progress=progress
        )
    for warning in opened.warnings:
        print(f"warns: {warning}")
    held, scans = opened.kept()
    ready = f"ready in {place}" if held == scans else f"checked, {held} of {scans} scans ready in {place}"
    print(f"{name}: {len(opened.patients)} patients {ready}, {len(opened.excluded)} left out")
    if not held:
        raise EnvironmentProblem(f"{place} holds none of {scans} scans; give a folder that can be written, with room")


def _place(data: str, state: Path | None) -> tuple[Path, str]:
    """Folder and name of a registered data set, or of a BIDS folder."""
    entry = _registered(data, state)
    return (Path(entry.path), entry.name) if entry else (Path(data), Path(data).resolve().name)


def _registered(data: str, state: Path | None) -> "Registered | None":
    """The registered data set of this name, also where a folder here is called so too; None: take it for a folder."""
    from .data.register import find_registered, is_registered

    if state is None or (Path(data).is_dir() and not is_registered(state, data)):
        return None
    return find_registered(state, data)


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal, nothing elsewhere."""
    from rich.console import Console
    from rich.progress import Progress

    # Without a thread that redraws it: processes that prepare scans are copies of this one.
    console = Console(stderr=True)
    with Progress(console=console, transient=True, auto_refresh=False, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total, refresh=True)


def _verdict(report: "Report", more: str) -> None:
    for finding in report.findings:
        who = ", ".join(finding.patients[:3]) + (", …" if len(finding.patients) > 3 else "")
        print(f"{finding.entry.severity}: {finding.entry.title}: {': '.join(filter(None, (who, finding.detail)))}")
    counts = report.counts()
    print(f"{len(report.patients)} patients: {counts['blocks']} block, {counts['warns']} warn, {counts['notes']} notes")
    if not report.may_join:
        raise DataError(f"{report.name} may not join: {counts['blocks']} findings must be settled first; {more}")

# SPDX-License-Identifier: Apache-2.0
"""What a hospital's disk can do to the data path: rights, links, bombs, many files, names. A line, nothing half."""

import gzip
import os
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from fedneuro.client.cli_data import app
from fedneuro.client.data import open_site
from fedneuro.client.data.dicom import import_dicom
from fedneuro.client.data.nifti import read_volume
from fedneuro.client.data.quality import check_data
from fedneuro.client.data.register import changes_of, manifest_of, register
from fedneuro.privacy.errors import DataError, EnvironmentProblem, FedNeuroError
from tests.bids import image_path, make_study, write_site
from tests.client.test_dicom_import import write_series

NOBODY = 65534


@pytest.fixture(scope="module", autouse=True)
def everything_is_imported(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Somebody else may not read Python's own files, which are loaded when they are first needed."""
    folder = tmp_path_factory.mktemp("warm")
    write_series(folder / "src")
    import_dicom(folder / "src", folder / "bids", folder / "state")
    open_site(write_site(folder / "HT"), make_study(), cache=folder / "cache")


@contextmanager
def without_rights(*paths: Path, mode: int) -> Iterator[None]:
    """Paths that may not be used; root, who may do everything, becomes somebody else meanwhile."""
    for path in paths:
        for parent in path.parents:
            if parent.stat().st_uid == os.geteuid() and "pytest" in str(parent):
                parent.chmod(0o755)
        path.chmod(mode)
    root = os.geteuid() == 0
    if root:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        for path in paths:
            path.chmod(0o755)


def test_unreadable_folders_are_named_not_passed_over(tmp_path: Path) -> None:
    root = write_site(tmp_path / "HT")
    register(tmp_path / "state", "glioma", root)
    study = make_study()
    inside = root / "sub-P002" / "anat"
    with without_rights(inside, mode=0):
        with pytest.raises(DataError, match=r"sub-P002/anat: cannot be read \(Permission denied\)"):
            open_site(root, make_study(data={"missing_modality": "exclude"}))
        with pytest.raises(DataError, match=r"sub-P002/anat: cannot be read \(Permission denied\)"):
            manifest_of(root)
    with without_rights(root, mode=0), pytest.raises(DataError, match=r"HT: cannot be read \(Permission denied\)"):
        open_site(root, study)
    with without_rights(image_path(root), mode=0), pytest.raises(DataError) as caught:
        open_site(root, study)
    assert len(str(caught.value).splitlines()) == 1 and "sub-P001_FLAIR.nii.gz" in str(caught.value)


def test_a_dicom_folder_that_cannot_be_read_leaves_the_others(tmp_path: Path) -> None:
    write_series(tmp_path / "src" / "open")
    write_series(tmp_path / "src" / "shut", patient="P2", uid="1.2.3.9")
    for place in ("bids", "state"):
        (tmp_path / place).mkdir()
        (tmp_path / place).chmod(0o777)
    with without_rights(tmp_path / "src" / "shut", mode=0):
        summary = import_dicom(tmp_path / "src", tmp_path / "bids", tmp_path / "state")
    assert len(summary.imported) == 1
    assert [why for why in summary.passed.values() if "cannot be read" in why]


def test_read_only_output_is_a_line_and_leaves_nothing(tmp_path: Path) -> None:
    write_series(tmp_path / "src")
    root = write_site(tmp_path / "HT")
    closed = tmp_path / "closed"
    closed.mkdir()
    with without_rights(closed, mode=0o555):
        with pytest.raises(EnvironmentProblem, match="cannot be written"):
            import_dicom(tmp_path / "src", closed / "bids", closed / "state")
        with pytest.raises(EnvironmentProblem, match="cannot be written"):
            register(closed / "state", "glioma", root)
        site = open_site(root, make_study(), cache=closed / "cache")
        assert [w for w in site.warnings if "cannot be written" in w] and site.scans("sub-P001")
    assert not list(closed.iterdir())


def test_links_that_lead_out_or_round_in_circles(tmp_path: Path) -> None:
    root = write_site(tmp_path / "HT")
    secret = tmp_path / "secret.nii.gz"
    image_path(root).rename(secret)
    image_path(root).symlink_to(secret)
    (root / "sub-P002" / "again").symlink_to(root)
    started = time.process_time()
    assert len(manifest_of(root)) == 10  # 4 images, 4 masks, 2 tables
    found = {finding.check for finding in check_data(root, pictures=0).findings}
    assert "link-outside" in found and time.process_time() - started < 10
    write_series(tmp_path / "src")
    (tmp_path / "src" / "up").symlink_to(tmp_path)
    (tmp_path / "src" / "out.dcm").symlink_to(secret)
    summary = import_dicom(tmp_path / "src", tmp_path / "bids", tmp_path / "state")
    assert set(summary.passed) == {"up", "out.dcm"} and all("link" in why for why in summary.passed.values())


def test_a_small_file_that_unfolds_to_much_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a sixteenth of the real limit, for speed; at the real one in ``test_data_fuzz``."""
    monkeypatch.setattr("fedneuro.client.data.nifti.MAX_BYTES", 1 << 26)
    root = write_site(tmp_path / "HT")
    image_path(root).write_bytes(gzip.compress(bytes(1 << 22), 9) * 20)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    report = check_data(root, pictures=0)
    assert not report.may_join and {p for f in report.findings for p in f.patients} >= {"sub-P001"}
    with pytest.raises(DataError, match=r"sub-P001_FLAIR\.nii\.gz: more than 67108864 bytes when unpacked"):
        open_site(root, make_study())
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10 < 256


def test_tables_without_end_or_of_another_kind(tmp_path: Path) -> None:
    """A device, a folder, another alphabet: each is a line, and none is read for ever."""
    write_series(tmp_path / "src")
    wide = tmp_path / "wide.tsv"
    wide.write_text("series\taction", "utf-16")
    for table, words in (
        (Path("/dev/zero"), "no file"),
        (tmp_path, "no file"),
        (wide, "not text in UTF-8"),
        (tmp_path / "x", "No such"),
    ):
        with pytest.raises(DataError, match=rf"cannot be read \(.*{words}") as caught:
            import_dicom(tmp_path / "src", tmp_path / "bids", tmp_path / "state", mapping=table)
        assert len(str(caught.value).splitlines()) == 1


def test_ten_thousand_small_files(tmp_path: Path) -> None:
    root = write_site(tmp_path / "HT")
    crowd = root / "sourcedata"
    crowd.mkdir()
    for number in range(10_000):
        (crowd / f"{number:05d}.bin").write_bytes(b"%d" % number)
    started = time.process_time()
    entry = register(tmp_path / "state", "crowd", root)
    (crowd / "04711.bin").unlink()
    assert len(entry.files) == 10_010 and changes_of(entry).removed == ("sourcedata/04711.bin",)
    write_series(crowd / "dicom")
    summary = import_dicom(crowd, tmp_path / "bids", tmp_path / "keys")
    assert len(summary.imported) == 1 and len(summary.passed) == 9_999
    assert time.process_time() - started < 60


def test_names_in_any_script(tmp_path: Path) -> None:
    place = tmp_path / "Größe 患者 – №1"
    write_series(place / "Übersicht")
    summary = import_dicom(place / "Übersicht", place / "BIDS ü", place / "state")
    assert len(summary.imported) == 1
    root = write_site(place / "Daten")
    state = ["--state", str(place / "state")]
    (place / "study.toml").write_text(
        '[study]\nname="toy"\n[data]\npatch=[16,16]\n[model]\nchannels=[4,8]\n[training]\nlocal_steps=1\n', "utf-8"
    )
    for arguments in (
        ["register", "glioma", str(root), *state],
        ["list", *state],
        ["check", "glioma", *state],
        ["stats", "glioma", *state],
        ["prepare", "glioma", "--study", str(place / "study.toml"), *state, "--workers", "1"],
    ):
        result = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
        assert result.exception is None or isinstance(result.exception, FedNeuroError), result.output
        assert arguments[0] == "check" or result.exit_code == 0
    assert (place / "state" / "checks" / "glioma" / "report.html").exists()
    assert len(list((place / "state" / "cache").glob("*/*.safetensors"))) == 4


def test_absurd_dimensions_cost_nothing(tmp_path: Path) -> None:
    """A header of 348 bytes may promise more voxels than there are atoms."""
    raw = bytearray(gzip.decompress(image_path(write_site(tmp_path / "HT")).read_bytes())[:352])
    for shape in ((32767, 32767, 32767), (1, 1, 1, 32767), (-1, 5, 5), (0, 0, 0)):
        dims = np.array([len(shape), *shape, *[1] * (7 - len(shape))], "<i2")
        raw[40:56] = dims.tobytes()
        path = tmp_path / "absurd_T1w.nii"
        path.write_bytes(raw)
        with pytest.raises(DataError) as caught:
            read_volume(path)
        assert len(str(caught.value).splitlines()) == 1

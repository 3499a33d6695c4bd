# SPDX-License-Identifier: Apache-2.0
"""Pictures with a table, nnU-Net's raw layout and outcome tables become BIDS, or a line that says what is wrong."""

import json
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from fedneuro.client.cli_data import app
from fedneuro.client.data.bids import find_patients, find_scans, read_participants
from fedneuro.client.data.foreign import Imported, import_images, import_nnunet, import_table
from fedneuro.privacy.errors import BadInput, DataError, StateError
from tests.bids import write_nifti, write_site

_NIB: Any = nibabel
COLUMNS: dict[str, Any] = {"patient": "who", "target": "kind", "file": "file", "suffix": "T1w", "size": 16}


def pictures(folder: Path, rows: str = "who,kind,file\nA17,x,a.png\nA17,x,b.png\nB2,y,b.png\n") -> Path:
    folder.mkdir(parents=True)
    for number, name in enumerate(("a.png", "b.png")):
        Image.fromarray(np.tile(np.arange(16, dtype=np.uint8) * 10 + number, (16, 1))).save(folder / name)
    (folder / "table.csv").write_text(rows)
    return folder


def test_pictures_with_a_table(tmp_path: Path) -> None:
    source = pictures(tmp_path / "src")
    out = tmp_path / "bids"
    assert import_images(source, source / "table.csv", out, tmp_path / "state", **COLUMNS) == Imported(2, {})
    table = read_participants(out)
    assert table is not None and sorted(row["kind"] for row in table.values()) == ["x", "y"]
    assert sorted(len(find_scans(out, p, ["T1w"], None)) for p in find_patients(out)) == [1, 2]
    assert not [p for p in out.rglob("*") if "A17" in p.name]
    image = _NIB.as_closest_canonical(_NIB.load(next(out.rglob("*.nii.gz"))))
    assert image.shape == (16, 16, 1) and float(image.dataobj[0, 0, 0]) in (150, 151)  # the picture's right is the left
    with pytest.raises(StateError, match="exists"):
        import_images(source, source / "table.csv", out, tmp_path / "state", **COLUMNS)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ("who,kind,file\nA,x,a.png\nA,y,b.png\n", "two classes"),
        ("who,kind,file\nA,x,c.png\n", "cannot be read"),
        ("who,kind,file\nA,x,../secret.png\n", "leads out"),
        ("who,file\nA,a.png\n", "no column kind"),
        ("who,kind,file\nA,x,a.png\n,y,b.png\n", "line 3: no who"),
    ],
)
def test_wrong_tables_leave_nothing_behind(rows: str, words: str, tmp_path: Path) -> None:
    source = pictures(tmp_path / "src", rows)
    with pytest.raises(DataError, match=words):
        import_images(source, source / "table.csv", tmp_path / "bids", tmp_path / "state", **COLUMNS)
    assert {p.name for p in tmp_path.iterdir()} <= {"src", "state"}
    small: dict[str, Any] = COLUMNS | {"size": 4}
    with pytest.raises(BadInput, match="8 to 1024"):
        import_images(source, source / "table.csv", tmp_path / "bids", tmp_path / "state", **small)


def test_pictures_that_fail_leave_the_others(tmp_path: Path) -> None:
    """Broken, absent, a bomb; sixteen bits are kept; the command counts what failed and ends with code 2."""
    source = pictures(
        tmp_path / "src", "who,kind,file\nA,x,a.png\nB,y,b.png\nC,x,bomb.png\nA,x,gone.png\nD,y,deep.png\n"
    )
    (source / "b.png").write_bytes((source / "b.png").read_bytes()[:50])
    Image.new("1", (14_000, 14_000)).save(source / "bomb.png")
    Image.fromarray(np.full((16, 16), 40_000, np.uint16)).save(source / "deep.png")
    out = tmp_path / "bids"
    arguments = ["import", "images", str(source), "--table", str(source / "table.csv"), "--patient", "who"]
    arguments += ["--target", "kind", "--out", str(out), "--state", str(tmp_path / "state")]
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, DataError) and "3 files failed" in str(result.exception)
    assert result.output.splitlines()[-1] == f"2 patients imported to {out}, 3 files failed"
    assert len((out / "participants.tsv").read_text().splitlines()) == 3
    values = {float(np.asarray(_NIB.load(path).dataobj).max()) for path in out.rglob("*.nii.gz")}
    assert values == {150.0, 40_000.0}


def test_nnunet_raw_layout(tmp_path: Path) -> None:
    source, out = tmp_path / "Dataset001", tmp_path / "bids"
    grey = np.random.default_rng(0).normal(size=(6, 5, 4)).astype(np.float32)
    for case in ("BRATS_001", "BRATS_002"):
        for channel in ("0000", "0001"):
            write_nifti(source / "imagesTr" / f"{case}_{channel}.nii.gz", grey)
        write_nifti(source / "labelsTr" / f"{case}.nii.gz", (grey > 1).astype(np.uint8))
    description = {"channel_names": {"0": "FLAIR", "1": "T1ce"}, "labels": {"background": 0, "tumour": 1}}
    (source / "dataset.json").write_text(json.dumps(description))
    broken = source / "imagesTr" / "BRATS_002_0001.nii.gz"
    sound = broken.read_bytes()
    broken.write_bytes(sound[:100])
    part = import_nnunet(source, tmp_path / "part", tmp_path / "state")
    assert part.patients == 1 and "cannot be read" in part.faults["imagesTr/BRATS_002_0001.nii.gz"]
    assert len(list((tmp_path / "part").rglob("*.nii.gz"))) == 3, "nothing of the other case"
    broken.write_bytes(sound)
    assert import_nnunet(source, out, tmp_path / "state") == Imported(2, {})
    for patient in find_patients(out):
        (scan,) = find_scans(out, patient, ["FLAIR", "ce-gadolinium_T1w"], "dseg")
        assert scan.mask is not None and None not in scan.images
        assert np.array_equal(np.asarray(_NIB.load(scan.images[0]).dataobj), grey)
    assert "1\ttumour" in (out / "derivatives" / "manual" / "dseg.tsv").read_text()
    with pytest.raises(DataError, match=r"dataset\.json"):
        import_nnunet(tmp_path / "state", tmp_path / "other", tmp_path / "state")


def test_outcomes_into_participants(tmp_path: Path) -> None:
    out = write_site(tmp_path / "bids", patients=3)
    table = tmp_path / "partitioning_1.csv"
    table.write_text("Partition_ID,Subject_ID,Name\n4,P001,Doe\n5,sub-P002,Roe\n5,P999,Moe\n")
    assert import_table(table, out, None, patient="Subject_ID", columns=["Partition_ID"]) == (2, 1)
    rows = read_participants(out)
    assert rows is not None and [row["Partition_ID"] for row in rows.values()] == ["4", "5", "n/a"]
    assert "Doe" not in (out / "participants.tsv").read_text()
    table.write_text("Subject_ID;Grade\nP001;II\n")  # as spreadsheets write it where the comma parts decimals
    assert import_table(table, out, None, patient="Subject_ID", columns=["Grade"]) == (1, 0)
    table.write_text("Partition_ID,Subject_ID\n4,P001\n5,P001\n")
    with pytest.raises(DataError, match="second row"):
        import_table(table, out, None, patient="Subject_ID", columns=["Partition_ID"])
    before = (out / "participants.tsv").read_bytes()
    table.write_text("Subject_ID,Partition_ID\n4711,1\n4712,2\n")
    with pytest.raises(DataError, match=r"none of 2 rows fits .* such as P001; .* give the node's --state"):
        import_table(table, out, None, patient="Subject_ID", columns=["Partition_ID"])
    assert (out / "participants.tsv").read_bytes() == before
    with pytest.raises(DataError, match="no column Stage"):
        import_table(table, out, None, patient="Subject_ID", columns=["Stage"])

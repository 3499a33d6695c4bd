# SPDX-License-Identifier: Apache-2.0
"""The register of data sets, and the ``data`` commands as staff meet them."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedneuro.client.cli_data import app
from fedneuro.client.data.register import changes_of, find_registered, list_registered, register
from fedneuro.privacy.contract import Role
from fedneuro.privacy.errors import BadInput, DataError, FedNeuroError, StateError
from tests.bids import image_path, write_site
from tests.client.test_dicom_import import write_series


def test_fingerprint_notices_and_names_every_change(tmp_path: Path) -> None:
    root = write_site(tmp_path / "bids")
    entry = register(tmp_path / "state", "glioma", root, licence="CC BY 4.0", consent="broad consent")
    assert (entry.patients, entry.public_size, entry.roles) == (4, 5, (Role.TRAIN,))
    assert find_registered(tmp_path / "state", "glioma") == entry
    assert not changes_of(entry)
    path = image_path(root)
    kept = path.read_bytes()
    path.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    (root / "participants.tsv").unlink()
    (root / "sub-P002" / "anat" / "note.txt").write_text("x")
    changes = changes_of(entry)
    assert changes.changed == ("sub-P001/anat/sub-P001_FLAIR.nii.gz",)
    assert changes.removed == ("participants.tsv",) and changes.added == ("sub-P002/anat/note.txt",)
    assert [line.split(":")[0] for line in changes.lines()] == ["1 added", "1 removed", "1 changed"]
    again = register(tmp_path / "state", "glioma", root, update=True)
    assert (again.licence, again.consent, again.roles) == ("CC BY 4.0", "broad consent", (Role.TRAIN,))
    assert again.fingerprint != entry.fingerprint and not changes_of(again)
    path.write_bytes(kept)
    assert changes_of(again)


def test_several_data_sets_and_wrong_entries(tmp_path: Path) -> None:
    state, root = tmp_path / "state", write_site(tmp_path / "bids")
    register(state, "one", root, roles=(Role.HELDOUT,), size=8)
    register(state, "two", root)
    assert register(state, "one", root, update=True).public_size == 8, "declared by hand, so it stays"
    assert find_registered(state, "one").roles == (Role.HELDOUT,)
    assert register(state, "one", root, update=True, size=6).public_size == 6
    assert [entry.name for entry in list_registered(state)] == ["one", "two"]
    assert list_registered(state)[0].roles == (Role.HELDOUT,)
    assert (state / "datasets" / "one.json").stat().st_mode & 0o777 == 0o600
    with pytest.raises(StateError, match="--update"):
        register(state, "one", root)
    with pytest.raises(BadInput, match="registered: one, two"):
        find_registered(state, "three")
    with pytest.raises(BadInput, match="letters, digits"):
        register(state, "../up", root)
    with pytest.raises(BadInput, match="public size 100"):
        register(state, "big", root, size=100)
    with pytest.raises(DataError, match="does not exist"):
        register(state, "gone", tmp_path / "gone")
    (state / "datasets" / "two.json").write_text("{")
    with pytest.raises(StateError, match="cannot be read"):
        list_registered(state)
    assert register(state, "two", root, update=True).patients == 4, "as the error says"


def call(*words: str | Path) -> tuple[int, str]:
    """Exit code, and what the command says, its error last."""
    done = CliRunner().invoke(app, [str(word) for word in words])
    if isinstance(done.exception, FedNeuroError):
        return done.exception.exit_code, f"{done.output}error: {done.exception}"
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.output


def test_commands_end_with_the_right_code_and_page(tmp_path: Path) -> None:
    root, state = write_site(tmp_path / "bids"), tmp_path / "state"
    assert call("register", "glioma", root, "--state", state)[0] == 0
    assert call("list", "--state", state)[0] == 0
    image_path(root).write_bytes(b"GIF89a" * 100)
    code, said = call("check", "glioma", "--state", state)
    assert code == 2 and "may not join" in said
    assert "A file that cannot be read" in said and "changed since it was registered" in said
    report = json.loads((state / "checks" / "glioma" / "report.json").read_text())
    assert report["may_join"] is False and report["findings"][0]["remedy"]
    page = (state / "checks" / "glioma" / "report.html").read_text()
    assert "sub-P001" in page and "data:image/png;base64," in page and "<script" not in page and "http://" not in page
    code, said = call("list", "--state", state)
    assert code == 2 and "CHANGED" in said
    for words, wrong in (
        (("check", tmp_path / "nowhere"), "does not exist"),
        (("check", "unknown", "--state", state), "no data set unknown"),
        (("import", "dicom", root, "--out", tmp_path / "o", "--state", state), "no DICOM object"),
        (("register", "x", root, "--state", state, "--role", "boss"), "expected train or heldout"),
    ):
        code, said = call(*words)
        assert code == 2 and wrong in said, said


def test_a_refused_series_ends_with_2_and_the_rest_is_there(tmp_path: Path) -> None:
    write_series(tmp_path / "src" / "good")
    write_series(tmp_path / "src" / "bad", slices=[0, 1, 2, 4, 5])
    code, said = call("import", "dicom", tmp_path / "src", "--out", tmp_path / "bids", "--state", tmp_path / "state")
    assert code == 2 and "1 series imported of 1 patients, 0 skipped, 1 refused, 0 files passed over" in said
    assert "faces were not removed" in said and len(list((tmp_path / "bids").rglob("*.nii.gz"))) == 1

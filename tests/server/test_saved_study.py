# SPDX-License-Identifier: Apache-2.0
"""A run of an older version of FedNeuro: shown, reported and verified as it is, and never gone on with."""

import hashlib
import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from fedneuro.privacy.errors import StateError
from fedneuro.privacy.manifest import verify_manifest
from fedneuro.server.launch import submit
from fedneuro.server.outcome import write_outcome
from fedneuro.server.run_folder import RunFolder
from fedneuro.server.run_view import view_run
from fedneuro.server.saved_study import read_saved
from fedneuro.server.store import RunStore
from tests.server.test_rounds import Sites, study_of
from tests.server.test_run_view import execute, launched


def older(canonical: bytes, **changes: Any) -> tuple[bytes, str]:
    """The text that a version without ``evaluation.strata``, and with a key that is gone, would have written."""
    values = json.loads(canonical)
    del values["evaluation"]["strata"]
    values["training"]["warp"] = 9
    for section, keys in changes.items():
        values[section] |= keys
    text = json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    return text, hashlib.sha256(text).hexdigest()


def age(folder: RunFolder) -> str:
    """Make the run in ``folder`` one of an older version; its study's hash."""
    text, study_hash = older(folder.study.read_bytes())
    folder.study.write_bytes(text)
    with closing(sqlite3.connect(folder.path / "state" / "run.db")) as db:
        db.execute("UPDATE run SET study = ?, study_hash = ?", (text, study_hash))
        db.commit()
    return study_hash


def test_an_older_run_is_shown_reported_and_verified_but_not_resumed(tmp_path: Path) -> None:
    folder = launched(tmp_path, study_of())
    execute(folder, Sites())
    study_hash = age(folder)
    view = view_run(folder)
    assert view.status == "complete" and view.study is not None and view.study.hash == study_hash
    results = write_outcome(folder.path)
    assert results["study_hash"] == study_hash and results["status"] == "complete"
    manifest, findings = verify_manifest(folder.path / "manifest.json")
    assert manifest is not None and manifest.study.hash == study_hash and '"warp":9' in manifest.study.canonical
    assert {finding.verdict for finding in findings} <= {"ok", "-"}
    with pytest.raises(StateError, match=r"saved by another version of FedNeuro.* not gone on with") as refused:
        RunStore.resume(folder.path, study_of(), engine="test")
    assert "\n" not in str(refused.value)


def test_submitting_an_older_run_is_refused_before_anything_is_asked(tmp_path: Path) -> None:
    folder = launched(tmp_path, study_of())
    folder.study.write_bytes(older(folder.study.read_bytes())[0])
    with pytest.raises(StateError, match="launch the study again"):
        submit(None, folder)  # type: ignore[arg-type]  # the consortium is not looked at


def test_a_study_of_today_is_not_called_older() -> None:
    study = study_of()
    assert read_saved(study.canonical, study.hash) == (study, False)


@pytest.mark.parametrize("fault", ["another hash", "another type", "not JSON"])
def test_what_cannot_be_shown_is_one_line(fault: str) -> None:
    text, study_hash = older(study_of().canonical)
    if fault == "another type":
        text, study_hash = older(study_of().canonical, training={"rounds": "many"})
    elif fault == "not JSON":
        text, study_hash = b"[", hashlib.sha256(b"[").hexdigest()
    with pytest.raises(StateError, match=r"cannot show|not the one with hash") as refused:
        read_saved(text, study_hash if fault != "another hash" else "0" * 64)
    assert "\n" not in str(refused.value)

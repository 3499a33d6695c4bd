# SPDX-License-Identifier: Apache-2.0
"""Places to write to are looked at before any work is done."""

from pathlib import Path

import pytest

from fedneuro.privacy.errors import StateError
from fedneuro.privacy.folders import require_empty, require_folder


def test_a_new_place_and_an_empty_folder_will_do(tmp_path: Path) -> None:
    require_empty(tmp_path)
    require_empty(tmp_path / "new" / "deeper")


def test_a_file_is_no_folder_nor_above_one(tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.touch()
    for out in (file, file / "deeper" / "still"):
        with pytest.raises(StateError, match=r"notes\.txt is a file, not a folder; give another --out"):
            require_folder(out)


def test_what_a_folder_holds_stays(tmp_path: Path) -> None:
    (tmp_path / "kept").touch()
    require_folder(tmp_path)
    with pytest.raises(StateError, match="is not an empty folder"):
        require_empty(tmp_path)

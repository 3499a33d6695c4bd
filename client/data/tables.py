# SPDX-License-Identifier: Apache-2.0
"""Reads the tables that people make in spreadsheets: bounded, in UTF-8, with a header."""

import csv
import io
from pathlib import Path
from typing import Any, Final

from ...privacy.errors import DataError

__all__ = ["read_rows"]

MAX_BYTES: Final = 64 << 20
"""A table of a million patients is smaller."""


def read_rows(path: Path, delimiter: str, expected: str, *, name: str = "") -> list[dict[str, Any]]:
    """Rows by column; columns that a line lacks are empty, what it has beyond the header stands under None.

    Args:
        path: of the table.
        delimiter: between columns; where a comma is expected and the header has none, a semicolon or tab will do.
        expected: what the table should be, for the message.
        name: of the table in the message; empty: its path.

    Raises:
        DataError: it is no regular file, too large, not UTF-8, or no table.
    """
    try:
        if path.exists() and not path.is_file():
            raise ValueError("it is no file")
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
        if len(raw) > MAX_BYTES:
            raise ValueError(f"it is larger than {MAX_BYTES >> 20} MiB")
        text = raw.decode("utf-8-sig")
        if "\0" in text:
            raise ValueError("it holds bytes of 0")
        header = text.partition("\n")[0]
        if delimiter == "," and "," not in header:  # spreadsheets of many countries write another one
            delimiter = next((other for other in ";\t" if other in header), delimiter)
        return list(csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, restval=""))
    except (OSError, ValueError, csv.Error) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        why = "it is not text in UTF-8" if isinstance(error, UnicodeDecodeError) else why
        raise DataError(f"{name or path}: cannot be read ({why}); expected {expected}") from error

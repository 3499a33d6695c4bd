# SPDX-License-Identifier: Apache-2.0
"""Folders that commands write to, looked at before any work is done."""

from pathlib import Path

from .errors import StateError

__all__ = ["require_empty", "require_folder"]


def require_folder(out: Path) -> None:
    """Refuse a place that is no folder and can never become one.

    Raises:
        StateError: ``out``, or a folder above it, is a file.
    """
    for path in (out, *out.parents):
        if path.exists():
            if not path.is_dir():
                raise StateError(f"--out {out}: {path} is a file, not a folder; give another --out")
            return


def require_empty(out: Path) -> None:
    """Refuse a folder that already holds something: nothing is overwritten.

    Raises:
        StateError: ``out`` is not empty, or :func:`require_folder` refuses it.
    """
    require_folder(out)
    if out.exists() and any(out.iterdir()):
        raise StateError(f"--out {out}: is not an empty folder; give a new --out")

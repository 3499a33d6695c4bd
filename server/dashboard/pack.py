# SPDX-License-Identifier: Apache-2.0
"""A release as one file for a browser: a tar archive made while it is sent, so it takes neither disk nor memory."""

import tarfile
from collections.abc import Iterator
from pathlib import Path

__all__ = ["tar_of"]

PART = 1 << 20
_END = bytes(1024)
"""Two empty blocks (POSIX.1, pax: ustar interchange format)."""


def tar_of(folder: Path) -> Iterator[bytes]:
    """The files of ``folder`` as an archive with that folder in it, without owners; links are left out."""
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()):
        info, status = tarfile.TarInfo(f"{folder.name}/{path.relative_to(folder).as_posix()}"), path.stat()
        info.size, info.mtime, info.mode = status.st_size, int(status.st_mtime), 0o644
        yield info.tobuf()
        with path.open("rb") as stream:
            while part := stream.read(PART):
                yield part
        yield bytes(-info.size % tarfile.BLOCKSIZE)
    yield _END

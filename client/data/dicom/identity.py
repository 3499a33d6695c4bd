# SPDX-License-Identifier: Apache-2.0
"""Pseudonyms by keyed hash, and the last look at what is written for anything that says who, where or when.

A pseudonym is HMAC-SHA256 of the identity under a key that never leaves the node's folder: who has the data set and a
list of all patient numbers of the hospital, but not the key, cannot match them. The same patient gets the same
pseudonym in every import at this hospital, and another one at another hospital. Keep the key as long as scans may be
added; without it a returning patient becomes a new one. Dates are dropped: sessions are named by keyed hash too, so
that their order and distance are not told.

Reference: ENISA, Pseudonymisation techniques and best practices (2019), section 5: HMAC as recommended technique.
"""

import base64
import hashlib
import hmac
import os
import secrets
from pathlib import Path
from typing import Final

from ....privacy.errors import BadInput, EnvironmentProblem

__all__ = ["Pseudonyms", "remains"]

KEY_FILE: Final = "pseudonym.key"
KEY_BYTES: Final = 32
LETTERS: Final = 10
"""Length of a patient's pseudonym: 50 bits, so that among 100,000 patients two share one with probability 4e-6."""


class Pseudonyms:
    """Names for patients, sessions and series, under the key of one hospital.

    Args:
        folder: the node's private folder; the key is made in it, readable by the owner alone, if there is none yet.

    Raises:
        BadInput: the key can be read by others, or is no key.
        EnvironmentProblem: the folder cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self._key = _load(folder / KEY_FILE) or _make(folder)

    def name(self, purpose: str, *identity: str, length: int = LETTERS) -> str:
        """Letters and digits that only the key, the purpose and the identity decide.

        Args:
            purpose: such as ``"patient"``; different purposes give unrelated names.
            identity: what is to be hidden, in parts.
            length: 1 to 51 characters of 5 bits each.
        """
        message = "\0".join((purpose, *identity)).encode("utf-8", "surrogateescape")
        digest = hmac.new(self._key, message, hashlib.sha256).digest()
        return base64.b32encode(digest).decode().lower()[:length]


def _load(path: Path) -> bytes | None:
    try:
        if not path.exists():
            return None
        if path.stat().st_mode & 0o077:
            raise BadInput(f"{path} can be read by others; expected mode 600; run chmod 600 on it")
        key = path.read_bytes()
    except OSError as error:
        raise EnvironmentProblem(
            f"{path}: cannot be read ({error.strerror}); run as the account that owns the node's folder"
        ) from error
    if len(key) != KEY_BYTES:
        raise BadInput(
            f"{path}: {len(key)} bytes; expected the {KEY_BYTES} of a pseudonym key; restore it from the back-up, or "
            "give another folder (patients then get new names)"
        )
    return key


def _make(folder: Path) -> bytes:
    path = folder / KEY_FILE
    key = secrets.token_bytes(KEY_BYTES)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "wb") as file:
            file.write(key)
            file.flush()
            os.fsync(file.fileno())
    except FileExistsError:  # two imports at once: the first one's key holds
        return _load(path) or key
    except OSError as error:
        raise EnvironmentProblem(
            f"{path}: cannot be written ({error.strerror}); give --keys a folder that the node's account owns"
        ) from error
    return key


def remains(content: bytes, values: set[str]) -> list[str]:
    """Identifying values that stand in ``content``, whatever the case of the letters."""
    low = content.lower()
    return sorted(value for value in values if value.lower().encode("utf-8", "replace") in low)

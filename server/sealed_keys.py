# SPDX-License-Identifier: Apache-2.0
"""The coordinator's private keys at rest: encrypted under a passphrase, and where the passphrase comes from.

PKCS #8 as the ``cryptography`` package writes it derives its key with 2048 rounds of PBKDF2 (seen with ``openssl
asn1parse``), which a stolen disk does not resist for long. So the key is sealed with AES-256-GCM under scrypt (RFC
7914; N = 2^17, r = 8: 128 MB and about half a second per guess), and the file says which key it holds, under the seal.
"""

import base64
import getpass
import json
import os
import secrets
import sys
from pathlib import Path
from typing import Annotated, Literal

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_der_private_key
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..privacy.errors import BadInput, EnvironmentProblem
from ..privacy.identity import require_private, write_private

__all__ = ["MIN_PASSPHRASE", "Passphrase", "open_key", "seal_key"]

MIN_PASSPHRASE = 12
"""Characters. Scrypt slows a guess down; it does not help against a word from a list."""
_SCRYPT_N, _SCRYPT_R = 2**17, 8
_Base64 = Annotated[str, Field(max_length=4096)]


class _Sealed(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    format: Literal["fedneuro-sealed-key-1"] = "fedneuro-sealed-key-1"
    holds: Annotated[str, Field(max_length=200)]
    n: Annotated[int, Field(ge=2**14, le=2**20)]
    r: Annotated[int, Field(ge=8, le=16)]
    salt: _Base64
    nonce: _Base64
    ciphertext: _Base64


class Passphrase:
    """Where one passphrase comes from: a file, a file descriptor, a variable, or the terminal, in this order.

    It is asked for once, however many keys it opens: a descriptor can be read once, and a person should type once.

    Args:
        what: the key that it opens, for the prompt.
        variable: environment variable.
        file: file whose first line it is; only its owner may read it.
        descriptor: number of an open file descriptor, for password managers.
    """

    def __init__(self, what: str, variable: str, file: Path | None = None, descriptor: int | None = None) -> None:
        self.what, self.variable = what, variable
        self._file, self._descriptor = file, descriptor
        self._known = ""

    def get(self, *, new: bool = False) -> str:
        """The passphrase; ``new``: asked twice, and at least :data:`MIN_PASSPHRASE` characters.

        Raises:
            BadInput: no source gives one, it is too short, or a source cannot be read.
        """
        found = self._known = self._known or self._find(new)
        if not found:
            raise BadInput(f"the passphrase of {self.what} is empty; give one")
        if new and len(found) < MIN_PASSPHRASE:
            raise BadInput(f"the passphrase of {self.what} is too short: at least {MIN_PASSPHRASE} characters")
        return found

    def _find(self, new: bool) -> str:
        try:
            if self._file is not None:
                require_private(self._file)
                return _first_line(self._file.read_text(encoding="utf-8"))
            if self._descriptor is not None:
                with os.fdopen(self._descriptor, encoding="utf-8", closefd=False) as stream:
                    return _first_line(stream.read())
        except (OSError, UnicodeDecodeError) as error:
            raise BadInput(f"the passphrase of {self.what} cannot be read: {error}") from error
        if value := os.environ.get(self.variable, ""):
            return value
        if not sys.stdin.isatty():
            text = f"no passphrase for {self.what}: set {self.variable}, give --passphrase-file or --passphrase-fd"
            raise BadInput(f"{text}, or run the command at a terminal")
        first = getpass.getpass(f"Passphrase of {self.what}: ")
        if new and getpass.getpass("The same again: ") != first:
            raise BadInput(f"the two passphrases of {self.what} differ; start again")
        return first


def seal_key(path: Path, key: EllipticCurvePrivateKey | Ed25519PrivateKey, holds: str, passphrase: str) -> None:
    """Write ``key`` to a new file ``path``, encrypted; ``holds`` says in words which key it is."""
    salt, nonce = secrets.token_bytes(16), secrets.token_bytes(12)
    plain = key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
    cipher = AESGCM(_derive(passphrase, salt, _SCRYPT_N, _SCRYPT_R))
    sealed = _Sealed(
        holds=holds,
        n=_SCRYPT_N,
        r=_SCRYPT_R,
        salt=_text(salt),
        nonce=_text(nonce),
        ciphertext=_text(cipher.encrypt(nonce, plain, holds.encode())),
    )
    write_private(path, json.dumps(sealed.model_dump(), indent=1).encode() + b"\n")


def open_key(
    path: Path, passphrase: Passphrase, *, lost: str = "make a new consortium and invite the hospitals again"
) -> EllipticCurvePrivateKey | Ed25519PrivateKey:
    """The key in ``path``; ``lost`` is what to do where nobody has it any more.

    Raises:
        EnvironmentProblem: the file is not there.
        BadInput: it can be read by others, is no sealed key, or the passphrase is another.
    """
    if not path.is_file():
        text = f"{path}: {passphrase.what} is not there; bring the file back from where it is kept"
        raise EnvironmentProblem(f"{text} (without it: {lost})")
    require_private(path)
    try:
        sealed = _Sealed.model_validate_json(path.read_bytes())
        salt, nonce, ciphertext = (base64.b64decode(part) for part in (sealed.salt, sealed.nonce, sealed.ciphertext))
    except (ValidationError, ValueError) as error:
        raise BadInput(
            f"{path}: is not a key that fedneuro-server sealed; bring the file back from a backup"
        ) from error
    try:
        cipher = AESGCM(_derive(passphrase.get(), salt, sealed.n, sealed.r))
        plain = cipher.decrypt(nonce, ciphertext, sealed.holds.encode())
    except InvalidTag as error:
        raise BadInput(f"{path}: wrong passphrase for {passphrase.what}, or the file was changed") from error
    key = load_der_private_key(plain, None)
    if not isinstance(key, EllipticCurvePrivateKey | Ed25519PrivateKey):
        raise BadInput(f"{path}: holds a key of another kind; bring the file back from a backup")
    return key


def _derive(passphrase: str, salt: bytes, n: int, r: int) -> bytes:
    return Scrypt(salt=salt, length=32, n=n, r=r, p=1).derive(passphrase.encode())


def _first_line(text: str) -> str:
    return text.splitlines()[0].strip() if text.strip() else ""


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")

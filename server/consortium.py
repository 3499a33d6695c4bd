# SPDX-License-Identifier: Apache-2.0
"""A consortium's folder: who signs what, and where everything lies.

.. code-block:: text

    DIR/server.toml                    settings
    DIR/root-key-MOVE-OFFLINE.json     the root's key, sealed: take it away; only `rotate --root-key` needs it
    DIR/ca/root.crt, root.crl          what hospitals pin; issuing keys that the root took back
    DIR/ca/issuing-1.crt, issuing-1.json   the issuing certificate and its sealed key
    DIR/study.json, study.pub          the key that signs studies, sealed, and its public half (hexadecimal)
    DIR/tls/server.crt, server.key     the server's chain and key
    DIR/state.db                       sites, invitations, certificates
    DIR/guard/                         what the reverse proxy reads

The server's TLS key is the only private key that lies open (mode 0600): processes must start without a person.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path

import sqlalchemy as sa
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding

from ..privacy.errors import BadInput, EnvironmentProblem, Refused, StateError
from ..privacy.identity import new_key, pkcs8, replace_file, require_private, write_private
from .authority import ROOT_LIFETIME, Authority, serial_text
from .consortium_settings import ServerSettings, load_server_settings, settings_text
from .registry import CertificateRecord, Registry, check_url
from .sealed_keys import Passphrase, open_key, seal_key

__all__ = ["ROOT_KEY", "Consortium", "Issuer", "create_consortium"]

ROOT_KEY = "root-key-MOVE-OFFLINE.json"


@dataclass(frozen=True, slots=True)
class Issuer:
    """The issuing keys, unlocked: number → authority. The newest signs; older ones still revoke what they signed."""

    authorities: dict[int, Authority]

    @property
    def number(self) -> int:
        """Number of the key that signs."""
        return max(self.authorities)

    @property
    def current(self) -> Authority:
        """The key that signs."""
        return self.authorities[self.number]

    def chain(self, certificate: x509.Certificate) -> str:
        """``certificate`` and the one that vouches for it, in PEM."""
        return "".join(_pem(part).decode("ascii") for part in (certificate, self.current.certificate))

    def record(self, certificate: x509.Certificate, site: str) -> CertificateRecord:
        """What the registry keeps of a site's new certificate."""
        return CertificateRecord(
            serial=serial_text(certificate),
            site=site,
            issuer=self.number,
            not_after=int(certificate.not_valid_after_utc.timestamp()),
            pem=_pem(certificate).decode("ascii"),
        )

    def revocations(self, records: Iterable[CertificateRecord], *, number: int) -> bytes:
        """One list per issuing key, in PEM."""
        revoked: dict[int, list[tuple[int, datetime]]] = {key: [] for key in self.authorities}
        for record in records:
            if record.revoked is not None and record.issuer in revoked:
                revoked[record.issuer].append((int(record.serial, 16), datetime.fromtimestamp(record.revoked, UTC)))
        lists = (self.authorities[key].revocations(entries, number=number) for key, entries in revoked.items())
        return b"".join(lists)


LOST_ISSUING = "fedneuro-server rotate --root-key FILE --take-back, and invite the hospitals again"
_LOST = {
    "tls/server.key": "fedneuro-server rotate makes a new one",
    "study.json": "make a new consortium; hospitals must trust another study key",
}
"""What to do where a key is lost and no backup has it."""


class Consortium:
    """An existing consortium.

    Args:
        folder: where ``init`` put it.

    Raises:
        BadInput: there is none, or a setting is wrong.
        Refused: others than its owner can read the folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self.settings = load_server_settings(self.folder / "server.toml")
        if self.folder.stat().st_mode & 0o077:
            raise Refused(f"{folder}: can be read by others; run chmod 700 on it")
        if not (self.folder / "ca" / "root.crt").is_file():
            raise EnvironmentProblem(f"{folder}: ca/root.crt is missing; bring the folder back from a backup")

    @property
    def name(self) -> str:
        """What it is called."""
        return self.settings.consortium.name

    @cached_property
    def root(self) -> x509.Certificate:
        """The root certificate."""
        return _load(self.folder / "ca" / "root.crt")

    @cached_property
    def registry(self) -> Registry:
        """The state store, opened at first use."""
        url = check_url(self.settings.state.url)
        if url.get_backend_name() == "sqlite" and url.database and not Path(url.database).is_absolute():
            url = sa.URL.create("sqlite", database=str(self.folder / url.database))
        return Registry(url)

    @property
    def study_key(self) -> str:
        """Public half of the key that signs studies, 64 hexadecimal digits."""
        return (self.folder / "study.pub").read_text(encoding="ascii").strip()

    def issuing(self) -> Iterator[tuple[int, x509.Certificate]]:
        """Number and certificate of every issuing key that the root has not taken back."""
        back = x509.load_pem_x509_crl((self.folder / "ca" / "root.crl").read_bytes())
        for path in sorted((self.folder / "ca").glob("issuing-*.crt")):
            certificate = _load(path)
            if back.get_revoked_certificate_by_serial_number(certificate.serial_number) is None:
                yield int(path.stem.partition("-")[2]), certificate

    def unlock(self, passphrase: Passphrase) -> Issuer:
        """The issuing keys.

        Raises:
            BadInput: another passphrase.
            EnvironmentProblem: a key file is missing.
        """
        found: dict[int, Authority] = {}
        for number, certificate in self.issuing():
            key = open_key(self.folder / "ca" / f"issuing-{number}.json", passphrase, lost=LOST_ISSUING)
            found[number] = Authority(certificate, _ecdsa(key))
        if not found or found[max(found)].certificate.not_valid_after_utc <= datetime.now(UTC):
            raise EnvironmentProblem("the issuing certificate has expired; fedneuro-server rotate --root-key FILE")
        return Issuer(found)

    def unlock_study_key(self, passphrase: Passphrase) -> Ed25519PrivateKey:
        """The key that signs studies (see :mod:`fedneuro.privacy.signing`).

        Raises:
            BadInput: another passphrase.
        """
        key = open_key(self.folder / "study.json", passphrase)
        if not isinstance(key, Ed25519PrivateKey):
            raise BadInput(f"{self.folder / 'study.json'}: is not the key that signs studies")
        return key

    def renew_server(self, issuer: Issuer) -> None:
        """A new key and certificate for the server itself."""
        key, host = new_key(), self.settings.server.host
        names = list(dict.fromkeys([host, "localhost", "127.0.0.1"]))
        chain = issuer.chain(issuer.current.server(key.public_key(), names))
        replace_file(self.folder / "tls" / "server.key", pkcs8(key))
        replace_file(self.folder / "tls" / "server.crt", chain.encode("ascii"), mode=0o644)

    def replace_issuing(
        self, root_key: Path, root_passphrase: Passphrase, passphrase: Passphrase, *, take_back: bool
    ) -> int:
        """A new issuing key, vouched for by the root; returns its number.

        Args:
            root_key: the root's sealed key, brought back for this.
            root_passphrase: opens it.
            passphrase: seals the new issuing key; the same as of the others.
            take_back: revoke the issuing keys so far, and with them every certificate that they signed.
        """
        root = Authority(self.root, _ecdsa(open_key(root_key, root_passphrase)))
        if root.key.public_key() != self.root.public_key():
            raise BadInput(f"{root_key}: is the root key of another consortium")
        present = dict(self.issuing())
        number = 1 + max(int(path.stem.partition("-")[2]) for path in (self.folder / "ca").glob("issuing-*.crt"))
        _write_issuing(self.folder, root, self.name, number, passphrase.get())
        back = x509.load_pem_x509_crl((self.folder / "ca" / "root.crl").read_bytes())
        revoked = [(entry.serial_number, entry.revocation_date_utc) for entry in back]
        if take_back:
            revoked += [(certificate.serial_number, datetime.now(UTC)) for certificate in present.values()]
        content = root.revocations(revoked, number=number, lifetime=ROOT_LIFETIME)
        replace_file(self.folder / "ca" / "root.crl", content, mode=0o644)
        if take_back:
            self.registry.take_back(list(present))
        return number

    def check_secure(self) -> None:
        """What ``start`` asks for.

        Raises:
            Refused: the root's key still lies here, or a private file can be read by others.
            EnvironmentProblem: a key is lost, or the server's certificate has expired.
        """
        if (root := self.folder / ROOT_KEY).exists():
            raise Refused(f"{root}: the root key is still on this machine; move it to a medium that you lock away")
        private = ["tls/server.key", "study.json", *(f"ca/issuing-{number}.json" for number, _ in self.issuing())]
        for name in private:
            if not (path := self.folder / name).is_file():
                remedy = _LOST.get(name, LOST_ISSUING)
                raise EnvironmentProblem(f"{path}: is not there; bring it back from a backup (without it: {remedy})")
            require_private(path)
        if _load(self.folder / "tls" / "server.crt").not_valid_after_utc <= datetime.now(UTC):
            raise EnvironmentProblem("the server's certificate has expired; run fedneuro-server rotate")


def create_consortium(
    folder: Path, settings: ServerSettings, root_passphrase: Passphrase, passphrase: Passphrase
) -> Consortium:
    """Make a consortium in a new or empty folder.

    Raises:
        StateError: the folder holds something.
        BadInput: a passphrase is missing or too short; the database's address is wrong.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise StateError(f"{folder}: is not an empty folder; a consortium is made once, give another --out")
    check_url(settings.state.url)
    words = root_passphrase.get(new=True), passphrase.get(new=True)
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    for name in ("ca", "tls", "guard", "logs", "invitations", "superlink"):
        (folder / name).mkdir(mode=0o700)
    name = settings.consortium.name
    root = Authority.root(f"{name} root")
    seal_key(folder / ROOT_KEY, root.key, f"root key of {name}", words[0])
    replace_file(folder / "ca" / "root.crt", _pem(root.certificate), mode=0o644)
    replace_file(folder / "ca" / "root.crl", root.revocations([], number=1, lifetime=ROOT_LIFETIME), mode=0o644)
    issuing = _write_issuing(folder, root, name, 1, words[1])
    study = Ed25519PrivateKey.generate()
    seal_key(folder / "study.json", study, f"study-signing key of {name}", words[1])
    replace_file(folder / "study.pub", study.public_key().public_bytes_raw().hex().encode() + b"\n", mode=0o644)
    write_private(folder / "server.toml", settings_text(settings).encode())  # last: from here on it is a consortium
    consortium = Consortium(folder)
    consortium.renew_server(Issuer({1: issuing}))
    consortium.registry.note("created", text=name)
    return consortium


def _write_issuing(folder: Path, root: Authority, name: str, number: int, passphrase: str) -> Authority:
    issuing = root.issuing(f"{name} issuing {number}")
    seal_key(folder / "ca" / f"issuing-{number}.json", issuing.key, f"issuing key {number} of {name}", passphrase)
    replace_file(folder / "ca" / f"issuing-{number}.crt", _pem(issuing.certificate), mode=0o644)
    return issuing


def _ecdsa(key: EllipticCurvePrivateKey | Ed25519PrivateKey) -> EllipticCurvePrivateKey:
    if not isinstance(key, EllipticCurvePrivateKey):
        raise BadInput("the file holds the study-signing key, not a key of the authority")
    return key


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(Encoding.PEM)


def _load(path: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except (OSError, ValueError) as error:
        raise EnvironmentProblem(f"{path}: is not a certificate; bring it back from a backup, or rotate") from error

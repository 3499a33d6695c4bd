# SPDX-License-Identifier: Apache-2.0
"""A hospital joins a consortium, and later renews its certificate. Private keys are made here and stay here.

    1. the invitation is read and its root certificate compared with its fingerprint
    2. two keys are made: one for the Flower node, one for TLS; only public halves are sent
    3. the call goes to a server that this root vouches for, and to no other, less what the root took back
       (:mod:`.revocations`); the one-time token proves who asks
    4. what comes back is checked: our name, our key, a chain up to the pinned root
    5. files are written with mode 0600, ``node.toml`` last; until then nothing counts as enrolled

A renewal makes a new TLS key; the node's key, by which other hospitals know this one, stays.
"""

import secrets
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import grpc
import tomlkit
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from tomlkit.exceptions import TOMLKitError

from ..privacy.contract import Role
from ..privacy.enrolment import (
    ENROL,
    MAX_MESSAGE_BYTES,
    RENEW,
    SERVICE,
    Credentials,
    EnrolRequest,
    Invitation,
    RenewRequest,
    decode,
    encode,
)
from ..privacy.errors import BadInput, ContractViolation, EnvironmentProblem, Refused
from ..privacy.identity import (
    fingerprint,
    new_key,
    openssh,
    pkcs8,
    public_pem,
    replace_file,
    require_private,
    signing_request,
    write_private,
)
from .revocations import seen_certificate

__all__ = ["Enrolled", "enrol", "renew"]

CALL_SECONDS = 30.0
FILES = {"authority": "ca.crt", "certificate": "site.crt", "tls_key": "site.key", "node_key": "node.key"}


@dataclass(frozen=True, slots=True)
class Enrolled:
    """What to show: everything here is public."""

    credentials: Credentials
    expires: datetime
    node_key: str
    """Public key of the node, PEM."""


def enrol(invitation: Invitation, config: Path) -> Enrolled:
    """Enrol with ``invitation``; writes keys, certificates and settings beside and into ``config`` (node.toml).

    Raises:
        BadInput: this folder is enrolled already, or ``node.toml`` is another site's or not TOML.
        Refused: the coordinator does not accept the invitation.
        EnvironmentProblem: the coordinator cannot be reached, or its certificate is another authority's.
        ContractViolation: its reply is not as agreed.
    """
    folder = config.resolve().parent
    taken = next((name for name in FILES.values() if (folder / name).exists()), None)
    if taken:
        text = f"{folder / taken}: is there already; fedneuro-node renew renews a certificate"
        raise BadInput(f"{text}, and to enrol anew move the old files away")
    document = _settings(config, invitation)
    root = invitation.root()
    node, tls = new_key(), new_key()
    request = EnrolRequest(
        token=invitation.token,
        site=invitation.site,
        request=signing_request(tls, invitation.site).decode("ascii"),
        node_key=public_pem(node).decode("ascii"),
    )
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    # On disk before the token is used up: a full disk must not cost an invitation.
    staged = {folder / FILES["node_key"]: openssh(node), folder / FILES["tls_key"]: pkcs8(tls)}
    for path, content in staged.items():
        _stage(path).unlink(missing_ok=True)
        write_private(_stage(path), content)
    try:
        credentials = _call(invitation.enrolment, ENROL, encode(request), root, revoked=_revocations(document, folder))
        leaf = _check(credentials, invitation.site, tls.public_key(), root)
        if credentials.role is not invitation.role:
            raise ContractViolation(f"the coordinator enrolled {invitation.site} as {credentials.role.value}; ask why")
        replace_file(folder / FILES["authority"], root.public_bytes(Encoding.PEM))
        replace_file(folder / FILES["certificate"], credentials.chain.encode("ascii"))
        for path in staged:
            _stage(path).replace(path)
    finally:
        for path in staged:
            _stage(path).unlink(missing_ok=True)
    _fill_in(document, credentials, folder)
    replace_file(config.resolve(), tomlkit.dumps(document).encode())
    return Enrolled(credentials, leaf.not_valid_after_utc, public_pem(node).decode("ascii"))


def renew(config: Path) -> Enrolled:
    """Get a new certificate with the present one; replaces ``site.crt`` and ``site.key`` in ``config``'s folder.

    Raises:
        BadInput: this folder is not enrolled, or its key can be read by others; the list of revocations is none.
        Refused: the certificate was revoked.
        EnvironmentProblem: the coordinator cannot be reached, the certificate has expired, or the coordinator's
            certificate was taken back.
    """
    folder, document = config.resolve().parent, _read(config)
    part = document.get("coordinator", {})
    paths = {name: folder / FILES[name] for name in ("authority", "certificate", "tls_key")}
    if "renewal" not in part or not all(path.is_file() for path in paths.values()):
        raise BadInput(f"{config}: this node is not enrolled; fedneuro-node enrol INVITATION")
    require_private(paths["tls_key"])
    try:
        root = x509.load_pem_x509_certificate(paths["authority"].read_bytes())
        present = x509.load_pem_x509_certificate(paths["certificate"].read_bytes())
    except ValueError as error:
        text = f"{paths['certificate']} and {paths['authority']}: must be certificates"
        raise BadInput(f"{text}; ask the coordinator for an invitation") from error
    if present.not_valid_after_utc <= datetime.now(UTC):
        text = f"{paths['certificate']}: expired on {present.not_valid_after_utc:%Y-%m-%d}"
        raise EnvironmentProblem(f"{text}; ask the coordinator for an invitation")
    site, tls = str(present.subject.rfc4514_string().partition("=")[2]), new_key()
    request = RenewRequest(request=signing_request(tls, site).decode("ascii"))
    pair = paths["tls_key"].read_bytes(), paths["certificate"].read_bytes()
    revoked = _revocations(document, folder)
    credentials = _call(str(part["renewal"]), RENEW, encode(request), root, pair, revoked)
    leaf = _check(credentials, site, tls.public_key(), root)
    # Key and chain are read together at the next start; both are whole at any moment.
    replace_file(paths["tls_key"], pkcs8(tls))
    replace_file(paths["certificate"], credentials.chain.encode("ascii"))
    _fill_in(document, credentials, folder)
    replace_file(config.resolve(), tomlkit.dumps(document).encode())
    return Enrolled(credentials, leaf.not_valid_after_utc, "")


def _call(
    address: str,
    method: str,
    content: bytes,
    root: x509.Certificate,
    pair: tuple[bytes, bytes] | None = None,
    revoked: Path | None = None,
) -> Credentials:
    """Step 3. ``pair``: private key and chain for mTLS; ``revoked``: the root's list, if the hospital has one."""
    key, chain = pair or (None, None)
    vouches = root.public_bytes(Encoding.PEM)
    if revoked is not None:
        try:
            vouches = seen_certificate(address, vouches, revoked)
        except ssl.SSLCertVerificationError as error:
            text = f"{address}: its certificate does not pass ({error.verify_message})"
            raise EnvironmentProblem(f"{text}; do not go on, telephone the coordinator") from error
        except OSError as error:
            text = f"{address}: cannot be reached ({error.strerror or error})"
            raise EnvironmentProblem(f"{text}; is the port open for outgoing connections?") from error
    trusted = grpc.ssl_channel_credentials(vouches, key, chain)
    options = (("grpc.max_receive_message_length", MAX_MESSAGE_BYTES), ("grpc.enable_retries", 0))
    with grpc.secure_channel(address, trusted, options=options) as channel:
        try:
            call: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(f"/{SERVICE}/{method}")
            return decode(Credentials, call(content, timeout=CALL_SECONDS))
        except grpc.RpcError as error:
            raise _explain(address, error, root) from error


def _explain(address: str, error: grpc.RpcError, root: x509.Certificate) -> Exception:
    code, details = error.code(), str(error.details() or "")[:300]
    line = " ".join(details.split())
    if code in (grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.RESOURCE_EXHAUSTED):
        return Refused(f"{address}: {line}; if it was you who used it, ask the coordinator for a new invitation")
    if code is grpc.StatusCode.INVALID_ARGUMENT:
        return ContractViolation(f"{address}: {line}; compare your version of FedNeuro with the coordinator's")
    if "CERTIFICATE_VERIFY_FAILED" in details or "certificate verify failed" in details.lower():
        text = f"{address}: is not vouched for by the pinned authority {fingerprint(root)[:16]}…"
        return EnvironmentProblem(f"{text}; do not go on, telephone the coordinator (or your clock is wrong)")
    if code is grpc.StatusCode.UNAVAILABLE and line.startswith("the coordinator"):
        return EnvironmentProblem(f"{address}: {line}")
    text = f"{address}: cannot be reached ({code.name.lower()}: {line[:120]})"
    return EnvironmentProblem(f"{text}; is the port open for outgoing connections, and the coordinator up?")


def _check(
    credentials: Credentials, site: str, key: ec.EllipticCurvePublicKey, root: x509.Certificate
) -> x509.Certificate:
    """Step 4; returns our certificate.

    Raises:
        ContractViolation: another name, another key, or not signed by the pinned authority.
    """
    try:
        chain = x509.load_pem_x509_certificates(credentials.chain.encode())
        for child, parent in zip(chain, [*chain[1:], root], strict=True):
            child.verify_directly_issued_by(parent)
        same_root = fingerprint(x509.load_pem_x509_certificate(credentials.authority.encode())) == fingerprint(root)
    except (ValueError, TypeError, InvalidSignature) as error:
        raise ContractViolation("the coordinator's reply holds no chain up to the pinned authority") from error
    mine = chain[0]
    ours = mine.subject.rfc4514_string() == f"CN={site}" and mine.public_key() == key
    if not same_root or credentials.site != site or not ours:
        raise ContractViolation("the coordinator's reply is for another site, key or authority")
    return mine


def _revocations(document: tomlkit.TOMLDocument, folder: Path) -> Path | None:
    """The list that ``node.toml`` names."""
    named = document.get("superlink", {}).get("revocations")
    return folder / Path(str(named)).expanduser() if named else None


# -- node.toml ---------------------------------------------------------------------------------------------


def _read(config: Path) -> tomlkit.TOMLDocument:
    try:
        return tomlkit.parse(config.read_text(encoding="utf-8")) if config.exists() else tomlkit.document()
    except OSError as error:
        raise BadInput(f"{config}: cannot be read ({error.strerror})") from error
    except (TOMLKitError, UnicodeDecodeError) as error:
        raise BadInput(f"{config}: is not TOML: {error}") from error


def _settings(config: Path, invitation: Invitation) -> tomlkit.TOMLDocument:
    """``node.toml`` as it is, checked against the invitation before anything is sent."""
    document = _read(config)
    site = document.get("site", {})
    for key, invited in (("name", invitation.site), ("role", invitation.role.value)):
        if (own := site.get(key, invited)) != invited:
            raise BadInput(f"{config}: site.{key} is {own!r}, the invitation is for {invited!r}; agree on one")
    return document


def _fill_in(document: tomlkit.TOMLDocument, credentials: Credentials, folder: Path) -> None:
    """Write what enrolment decides; what the hospital wrote itself is left as it is, comments included."""
    _set(document, "site", ("name", credentials.site), ("role", _granted(document, credentials.role)))
    names = [("root_certificate", FILES["authority"]), ("key", FILES["node_key"])]
    tls = [("certificate", FILES["certificate"]), ("certificate_key", FILES["tls_key"])]
    _set(document, "superlink", ("address", credentials.superlink), *names, *tls)
    _set(
        document,
        "coordinator",
        ("consortium", credentials.consortium),
        ("renewal", credentials.renewal),
        ("study_key", credentials.study_key),
    )
    runner = document.get("runner", {})
    secret = str(runner.get("secret", "runner.secret"))
    _set(document, "runner", ("port", runner.get("port", 9094)), ("secret", secret), ("bundle", credentials.bundle))
    if not (path := folder / Path(secret).expanduser()).exists():
        write_private(path, secrets.token_hex(32).encode())
    if "study" not in document:
        _set(document, "study", ("policy", "policy.toml"))  # which denies until the hospital writes one


def _granted(document: tomlkit.TOMLDocument, invited: Role) -> str:
    return str(document.get("site", {}).get("role", invited.value))


def _set(document: tomlkit.TOMLDocument, section: str, *values: tuple[str, object]) -> None:
    if section not in document:
        document[section] = tomlkit.table()
    _assign(document[section], values)


def _assign(table: object, values: Sequence[tuple[str, object]]) -> None:
    for key, value in values:
        table[key] = value  # type: ignore[index]


def _stage(path: Path) -> Path:
    return path.with_name(f".{path.name}.new")

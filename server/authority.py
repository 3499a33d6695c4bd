# SPDX-License-Identifier: Apache-2.0
"""The consortium's certificate authority: a root that stays offline, an issuing key that works, and what they sign.

The root signs issuing certificates and is otherwise locked away; hospitals pin it, so an issuing key can be replaced
without asking them anything. The issuing key signs the server's certificate, one client certificate per hospital,
and the list of revoked ones. All keys are ECDSA P-384 with SHA-384. References: RFC 5280 (profile), RFC 2986.
"""

import ipaddress
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from ..privacy.errors import ContractViolation
from ..privacy.identity import is_p384, new_key

__all__ = [
    "CRL_LIFETIME",
    "ISSUING_LIFETIME",
    "ROOT_LIFETIME",
    "SERVER_LIFETIME",
    "SITE_LIFETIME",
    "Authority",
    "common_name",
    "requested_key",
    "serial_text",
]

ROOT_LIFETIME = timedelta(days=3650)
ISSUING_LIFETIME = timedelta(days=1095)
SERVER_LIFETIME = timedelta(days=365)
SITE_LIFETIME = timedelta(days=180)
CRL_LIFETIME = timedelta(days=14)
"""A guard with an older list refuses everybody; ``start`` signs a new one long before."""
_BACKDATED = timedelta(hours=1)
"""Clocks of hospitals differ."""


@dataclass(frozen=True, slots=True)
class Authority:
    """A certificate and its key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @classmethod
    def root(cls, name: str, *, path_length: int = 1, lifetime: timedelta = ROOT_LIFETIME) -> "Authority":
        """A new root, signed by itself. ``path_length`` 0: it signs servers and sites itself."""
        key, subject = new_key(), _name(name)
        builder = _authority(_begin(subject, subject, key.public_key(), lifetime), key.public_key(), path_length)
        return cls(builder.sign(key, hashes.SHA384()), key)

    def issuing(self, name: str, *, lifetime: timedelta = ISSUING_LIFETIME) -> "Authority":
        """A new issuing key, vouched for by this one."""
        key = new_key()
        begun = _begin(_name(name), self.certificate.subject, key.public_key(), lifetime)
        builder = _authority(begun, key.public_key(), 0).add_extension(self._key_id(), critical=False)
        return Authority(builder.sign(self.key, hashes.SHA384()), key)

    def server(
        self, key: ec.EllipticCurvePublicKey, names: Sequence[str], *, lifetime: timedelta = SERVER_LIFETIME
    ) -> x509.Certificate:
        """A server certificate for ``names``: host names and IP addresses, the first of them its subject."""
        alternatives = x509.SubjectAlternativeName([_general_name(name) for name in names])
        builder = self._leaf(key, names[0], lifetime, ExtendedKeyUsageOID.SERVER_AUTH)
        return builder.add_extension(alternatives, critical=False).sign(self.key, hashes.SHA384())

    def site(
        self, key: ec.EllipticCurvePublicKey, site: str, *, lifetime: timedelta = SITE_LIFETIME
    ) -> x509.Certificate:
        """A client certificate in the name of ``site``."""
        builder = self._leaf(key, site, lifetime, ExtendedKeyUsageOID.CLIENT_AUTH)
        return builder.sign(self.key, hashes.SHA384())

    def revocations(
        self, revoked: Iterable[tuple[int, datetime]], *, number: int, lifetime: timedelta = CRL_LIFETIME
    ) -> bytes:
        """The list of revoked certificates in PEM: serial number and time of each."""
        now = datetime.now(UTC)
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(self.certificate.subject)
            .last_update(now - _BACKDATED)
            .next_update(now + lifetime)
            .add_extension(self._key_id(), critical=False)
            .add_extension(x509.CRLNumber(number), critical=False)
        )
        for serial, when in revoked:
            entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(when).build()
            builder = builder.add_revoked_certificate(entry)
        return builder.sign(self.key, hashes.SHA384()).public_bytes(Encoding.PEM)

    def _leaf(
        self, key: ec.EllipticCurvePublicKey, subject: str, lifetime: timedelta, purpose: x509.ObjectIdentifier
    ) -> x509.CertificateBuilder:
        # A certificate that outlives its issuer would be refused at a day that nobody expects.
        lifetime = min(lifetime, self.certificate.not_valid_after_utc - datetime.now(UTC))
        return (
            _begin(_name(subject), self.certificate.subject, key, lifetime)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(sign_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
            .add_extension(self._key_id(), critical=False)
        )

    def _key_id(self) -> x509.AuthorityKeyIdentifier:
        own = self.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
        return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(own)


def requested_key(request: bytes, site: str) -> ec.EllipticCurvePublicKey:
    """The public key of a certificate request, which must ask for exactly the name ``site`` and nothing else.

    Raises:
        ContractViolation: not a PKCS #10 request, not signed with its own key, another kind of key, another name,
            or any extension (alternative names, authority rights) asked for.
    """
    try:
        found = x509.load_pem_x509_csr(request)
        key, extensions, signed = found.public_key(), list(found.extensions), found.is_signature_valid
        attributes = [(item.oid, item.value) for item in found.subject]
    except (ValueError, TypeError, UnsupportedAlgorithm, InvalidSignature) as error:
        raise ContractViolation("the certificate request cannot be read") from error
    if not signed:
        raise ContractViolation("the certificate request is not signed with the key that it names")
    if not isinstance(key, ec.EllipticCurvePublicKey) or not is_p384(key):
        raise ContractViolation("the certificate request brings another key than P-384")
    if attributes != [(NameOID.COMMON_NAME, site)]:
        raise ContractViolation("the certificate request asks for another name than the invitation's site")
    if extensions:
        raise ContractViolation("the certificate request asks for extensions; none are granted")
    return key


def common_name(certificate: x509.Certificate) -> str:
    """The name in a certificate's subject, or an empty text."""
    found = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(found[0].value) if len(found) == 1 else ""


def serial_text(certificate: x509.Certificate) -> str:
    """The serial number as nginx writes it (``$ssl_client_serial``): whole bytes, upper case."""
    digits = f"{certificate.serial_number:X}"
    return digits.zfill(len(digits) + len(digits) % 2)


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _general_name(text: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(text))
    except ValueError:
        return x509.DNSName(text)


def _begin(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, lifetime: timedelta
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BACKDATED + min(timedelta(0), lifetime))
        .not_valid_after(now + lifetime)
    )


def _authority(
    builder: x509.CertificateBuilder, key: ec.EllipticCurvePublicKey, path_length: int
) -> x509.CertificateBuilder:
    return (
        builder.add_extension(x509.BasicConstraints(ca=True, path_length=path_length), critical=True)
        .add_extension(_usage(sign_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _usage(*, sign_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not sign_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=sign_certificates,
        crl_sign=sign_certificates,
        encipher_only=False,
        decipher_only=False,
    )

# SPDX-License-Identifier: Apache-2.0
"""The way from this machine to the coordinator, hop by hop: name, proxy, port, TLS, clock.

The node calls out and nothing calls in. The way is walked as Flower's client walks it (:mod:`.way`); TLS 1.2 or newer,
trusting the pinned authority alone. A proxy that opens TLS is therefore a failure.
"""

import email.utils
import os
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path

from .doctor import Finding, fail, passed, warn
from .node_settings import NodeSettings
from .revocations import Revocations, refuse_revoked
from .way import Way, head_of_answer

__all__ = ["network_checks", "port_sheet"]

AHEAD_SECONDS, BEHIND_SECONDS = 5.0, 300.0
"""Flower's SuperLink takes a node's clock that is at most so far ahead or behind."""


def network_checks() -> tuple[Callable[[NodeSettings], Iterator[Finding]], ...]:
    """The checks, in order."""
    return (_way,)


def _way(settings: NodeSettings) -> Iterator[Finding]:
    """Each hop needs the one before, so the first that fails is the last that is tried."""
    way = Way(settings.superlink.address)
    host, port = way.first_hop
    try:
        addresses = sorted({str(info[4][0]) for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)})
    except OSError as error:
        yield fail("name", f"{host}: {error.strerror or error}", "ask for a DNS entry, or check superlink.address")
        return
    yield passed("name", f"{host} is {', '.join(addresses[:3])}")
    through = f" through the proxy {host}:{port}" if way.proxy.hostname else ""
    try:
        connection = way.connect()
    except OSError as error:
        seen = f"{settings.superlink.address}{through}: {error.strerror or error}"
        yield fail("connection", seen, "open the port for outgoing connections: fedneuro-node doctor --ports")
        return
    with closing(connection):
        yield passed("connection", f"{settings.superlink.address}{through} answers")
        yield from _tls(settings, way, connection)


def _tls(settings: NodeSettings, way: Way, connection: socket.socket) -> Iterator[Finding]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_verify_locations(settings.superlink.root_certificate)
    link = settings.superlink
    if link.certificate and link.certificate_key:
        context.load_cert_chain(link.certificate, link.certificate_key)
    if link.revocations:
        refuse_revoked(context, Revocations(Path(link.revocations), link.root_certificate))
    try:
        with context.wrap_socket(connection, server_hostname=way.host) as secure:
            certificate = secure.getpeercert() or {}
            expires = ssl.cert_time_to_seconds(str(certificate["notAfter"]))
            days = (expires - time.time()) / 86400
            seen = f"{secure.version()}, vouched for by the pinned authority, {days:.0f} days left"
            yield passed("TLS", seen) if days > 14 else warn("TLS", seen, "tell the coordinator to renew it")
            answer = _ask(secure, way)
            yield _clock(answer)
            if link.certificate and answer.split("\r\n")[0].split(" ")[1:2] == ["400"]:
                seen = "the coordinator's guard does not take it: it was revoked, or replaced by a newer one"
                yield fail("certificate", seen, "ask the coordinator; a new invitation makes a new one")
    except ssl.SSLCertVerificationError as error:
        remedy = f"if it should be the coordinator: compare {Path(link.root_certificate).name} by telephone. "
        remedy += "A proxy that opens TLS must leave this host alone; a wrong clock looks like this too"
        yield fail("TLS", f"the certificate does not pass: {error.verify_message}", remedy)
    except OSError as error:
        yield fail("TLS", f"{error}", "is this the coordinator's port? does a firewall cut TLS?")


def _ask(secure: ssl.SSLSocket, way: Way) -> str:
    """The head of an HTTP answer; nginx says only there, with 400, that it does not take a client certificate."""
    with suppress(OSError):
        secure.sendall(f"GET /health HTTP/1.1\r\nHost: {way.host}\r\nConnection: close\r\n\r\n".encode("ascii"))
        return head_of_answer(secure)
    return ""


def _clock(answer: str) -> Finding:
    """The coordinator's clock is in the head of any HTTP answer, also of a refusal."""
    for line in answer.split("\r\n"):
        if line.lower().startswith("date:"):
            with suppress(ValueError, TypeError):
                moment = email.utils.parsedate_to_datetime(line.partition(":")[2].strip())
                return _skew(time.time() - moment.timestamp())
    return warn("clock", "the coordinator does not tell its time", "make sure that this machine keeps time (NTP)")


def _skew(ahead: float) -> Finding:
    """``ahead``: seconds; the header has whole seconds, so one is noise."""
    remedy = "let the machine keep time by NTP: timedatectl set-ntp true"
    if ahead > AHEAD_SECONDS or ahead < -BEHIND_SECONDS:
        word = "ahead of" if ahead > 0 else "behind"
        return fail("clock", f"{abs(ahead):.0f} s {word} the coordinator, which refuses that", remedy)
    if abs(ahead) > AHEAD_SECONDS / 2:
        return warn("clock", f"{ahead:+.0f} s from the coordinator's", remedy)
    return passed("clock", "agrees with the coordinator's")


def port_sheet(settings: NodeSettings) -> str:
    """What to ask the firewall's owner for."""
    way = Way(settings.superlink.address)
    rows = [("coordinator", settings.superlink.address, "TLS (HTTPS)", "rounds: models in, updates out; always on")]
    if settings.coordinator is not None:
        rows.append(("coordinator", settings.coordinator.renewal, "TLS (gRPC)", "certificate renewal; twice a year"))
    if way.proxy.hostname:
        host, port = way.first_hop
        rows.append(("your proxy", f"{host}:{port}", "HTTP CONNECT", "the first row goes through it"))
    lines = [
        "Firewall ticket for a FedNeuro node. Outgoing TCP only; nothing has to be opened for incoming traffic.",
        "",
    ]
    lines.append(f"{'from':<20} {'to':<36} {'what':<14} why")
    source = socket.gethostname()
    lines += [f"{source:<20} {address:<36} {kind:<14} {why}" for _, address, kind, why in rows]
    lines += ["", f"Inside this machine only: 127.0.0.1:{settings.runner.port}, between two processes of the node."]
    if os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy"):
        lines.append("The proxy must not open TLS to this host: the node trusts the consortium's own authority alone.")
    return "\n".join(lines)

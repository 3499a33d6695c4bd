# SPDX-License-Identifier: Apache-2.0
"""The enrolment service on the wire: gRPC over TLS on two ports, health checking on, reflection off.

gRPC's Python server either demands a client certificate or does not look at it, so first contact (``Enrol``, by
token) and ``Renew`` (mTLS) have a port each. Both take small messages only, few calls at a time, and drop callers
that hold a connection without using it. What goes back of an error is a status code and one fixed sentence.
"""

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from ..privacy.enrolment import ENROL, MAX_MESSAGE_BYTES, RENEW, SERVICE
from ..privacy.errors import ContractViolation, EnvironmentProblem, Refused
from .consortium import Consortium
from .enrolment import Enrolment
from .limits import TooMany, peer_address

__all__ = ["EnrolmentService"]

_OPTIONS = (
    ("grpc.so_reuseport", 0),  # a second service on the port is an error, not a lottery
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_metadata_size", 8 * 1024),
    ("grpc.max_concurrent_streams", 4),
    ("grpc.server_handshake_timeout_ms", 10_000),
    ("grpc.max_connection_idle_ms", 30_000),
    ("grpc.max_connection_age_ms", 120_000),
    ("grpc.max_connection_age_grace_ms", 10_000),
    ("grpc.http2.min_ping_interval_without_data_ms", 30_000),
)
_WORKERS, _CALLS = 4, 512
"""Threads, and calls at a time: more wait than work, so that a few that send nothing keep nobody out."""
_log = logging.getLogger("fedneuro.enrolment")

_Method = Callable[[bytes, grpc.ServicerContext], bytes]


class EnrolmentService:
    """Both ports of one consortium. A context manager: leaving it ends them.

    Args:
        consortium: its settings, certificate and key.
        enrolment: who answers.

    Raises:
        EnvironmentProblem: a port is in use.
    """

    def __init__(self, consortium: Consortium, enrolment: Enrolment) -> None:
        folder, settings = consortium.folder, consortium.settings
        pair = ((folder / "tls" / "server.key").read_bytes(), (folder / "tls" / "server.crt").read_bytes())
        trusted = (folder / "guard" / "trust.pem").read_bytes()
        self._enrolment = enrolment
        self._servers = [
            _serve(f"{settings.server.listen}:{port}", credentials, name, method)
            for port, credentials, name, method in (
                (settings.ports.enrolment, grpc.ssl_server_credentials([pair]), ENROL, self._enrol),
                (
                    settings.ports.renewal,
                    grpc.ssl_server_credentials([pair], trusted, require_client_auth=True),
                    RENEW,
                    self._renew,
                ),
            )
        ]

    def __enter__(self) -> "EnrolmentService":
        return self

    def __exit__(self, *_: object) -> None:
        for stopped in [server.stop(grace=2) for server in self._servers]:
            stopped.wait()

    def _enrol(self, content: bytes, context: grpc.ServicerContext) -> bytes:
        return self._enrolment.enrol(content, peer_address(context.peer()))

    def _renew(self, content: bytes, context: grpc.ServicerContext) -> bytes:
        present = context.auth_context().get("x509_pem_cert", [b""])[0]
        return self._enrolment.renew(content, bytes(present), peer_address(context.peer()))


def _serve(address: str, credentials: grpc.ServerCredentials, name: str, method: _Method) -> grpc.Server:
    server = grpc.server(ThreadPoolExecutor(_WORKERS), options=_OPTIONS, maximum_concurrent_rpcs=_CALLS)
    # Bytes in, bytes out: the strict models of privacy.enrolment are the only reader.
    handler: grpc.RpcMethodHandler[bytes, bytes] = grpc.unary_unary_rpc_method_handler(_guarded(method))
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {name: handler}),))
    state = health.HealthServicer()
    state.set(SERVICE, health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(state, server)
    try:
        bound = server.add_secure_port(address, credentials)
    except RuntimeError:
        bound = 0
    if not bound:
        raise EnvironmentProblem(f"port {address} cannot be used for enrolment; stop what uses it, or change [ports]")
    server.start()
    return server


def _guarded(method: _Method) -> _Method:
    """``method`` with our errors as status codes, and any other as one that says nothing."""

    def call(content: bytes, context: grpc.ServicerContext) -> bytes:
        try:
            return method(content, context)
        except ContractViolation as error:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        except Refused as error:
            busy = isinstance(error, TooMany)
            code = grpc.StatusCode.RESOURCE_EXHAUSTED if busy else grpc.StatusCode.PERMISSION_DENIED
            context.abort(code, str(error))
        except EnvironmentProblem as error:
            _log.error("%s", error)
            text = "the coordinator cannot enrol just now; the invitation still holds, try again in a minute"
            context.abort(grpc.StatusCode.UNAVAILABLE, text)
        except Exception:
            _log.exception("unexpected error")
            context.abort(grpc.StatusCode.INTERNAL, "unexpected error; the coordinator finds it in its log")
        raise AssertionError("unreachable: abort raises")

    return call

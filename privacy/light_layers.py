# SPDX-License-Identifier: Apache-2.0
"""Flower's HTTP applications with less around each request, which moves one small part of a message.

The SuperLink's has nine layers around it, the SuperNode's three, made for streams of any length: each costs a task, two
queues and a copy of the answer; and each value that a handler needs is fetched by a thread. With that, these processes
are at work for most of the time that a round without work takes. For requests of nodes and of runners, whose answers
are one message each,

    layers    that do nothing for them are gone around, and the others are asked what they were asked before, but
              without tasks and queues
    values    that are there already (the state, the request as it was read, its versions) are taken without a thread

Which layers there are, in which order, and what each of them checks stays Flower's. Tests know the lists.
"""

from collections.abc import Mapping
from typing import Any, Final

__all__ = ["FLEET", "RUNTIME", "lighten_layers", "take_values_at_once"]

FLEET: Final = "/v1/fleet/"
RUNTIME: Final = "/v1/runtime/"


def lighten_layers(around: Mapping[Any, tuple[str, ...]]) -> None:
    """Change how the layers (Starlette's ``BaseHTTPMiddleware``) of this process are asked.

    Args:
        around: classes of layers that requests to paths that begin so go around.
    """
    from starlette.middleware.base import BaseHTTPMiddleware

    ask: Any = BaseHTTPMiddleware.__call__

    async def asked(self: BaseHTTPMiddleware, scope: Any, receive: Any, send: Any) -> None:
        path = scope["path"] if scope["type"] == "http" else ""
        if path.startswith(around.get(type(self), ())):
            await self.app(scope, receive, send)
        elif path.startswith((FLEET, RUNTIME)):
            await _ask(self, scope, receive, send)
        else:
            await ask(self, scope, receive, send)

    BaseHTTPMiddleware.__call__ = asked  # type: ignore[method-assign]


async def _ask(layer: Any, scope: Any, receive: Any, send: Any) -> None:
    """As ``BaseHTTPMiddleware.__call__``, for an answer that is one message."""
    from starlette.middleware.base import _CachedRequest
    from starlette.responses import Response

    request = _CachedRequest(scope, receive)

    async def call_next(_: Any) -> Response:
        parts: list[Any] = []

        async def collect(part: Any) -> None:
            parts.append(part)

        await layer.app(scope, request.wrapped_receive, collect)
        if not parts:
            raise RuntimeError("no answer was given")
        response = Response(b"".join(part.get("body", b"") for part in parts[1:]), parts[0]["status"])
        response.raw_headers = list(parts[0]["headers"])
        return response

    response = await layer.dispatch_func(request, call_next)
    await response(scope, request.wrapped_receive, send)


def take_values_at_once(*handed: Any) -> None:
    """Let FastAPI call, in this process, what only hands a value over, instead of asking a thread to.

    Args:
        handed: such functions, beside those that all of Flower's applications have.
    """
    from fastapi.dependencies import utils
    from flwr.supercore.dependencies.runtime import get_runtime_handlers, get_runtime_state
    from flwr.supercore.dependencies.version import VersionDependency
    from flwr.supercore.protobuf.translation import get_protobuf_request

    at_once = {get_runtime_state, get_runtime_handlers, get_protobuf_request, *handed}
    in_thread = utils.__dict__["run_in_threadpool"]

    async def called(call: Any, **values: Any) -> Any:
        if call in at_once or isinstance(call, VersionDependency):
            return call(**values)
        return await in_thread(call, **values)

    utils.__dict__["run_in_threadpool"] = called

# SPDX-License-Identifier: Apache-2.0
"""Whoever asks the SuperLink for messages is answered when there is one, not told "none" and to ask again.

Flower moves messages by asking: each node asks whether there is a message for it, the coordinator whether there is an
answer. Each such look is a request with a write to the database; a few nodes that look twice a second keep the one
process of the SuperLink busy while it should move messages, and still each message waits for the next look. So a look
that can find nothing, since the same look found nothing and nothing came since, is held until something is there, all
of it, or for :data:`NODE_SECONDS` or :data:`GRID_SECONDS`; then it goes on to Flower's own code, which decides as ever
who gets what. Nothing is answered here and no check is passed by: news only end a wait.

A look is held by no thread. One whose asker hangs up meanwhile is dropped, so that no message is given to nobody. At
most :data:`MOST_HELD` are held at a time; further ones go on at once, as without this.
"""

import asyncio
import threading
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any, Final

from flwr.proto.fleet_pb2 import PullMessagesRequest
from flwr.proto.runtime_pb2 import PullAppMessagesRequest
from google.protobuf.message import DecodeError

__all__ = ["GRID_PULL", "NODE_PULL", "HeldLooks", "News"]

NODE_PULL: Final = "/v1/fleet/pull-messages"
GRID_PULL: Final = "/v1/runtime/pull-messages"
NODE_SECONDS, GRID_SECONDS = 5.0, 1.0
"""How long at most: nodes that stop, and a coordinator that is told to, notice it between two looks."""
MOST_HELD = 256
MOST_KNOWN = 4096
"""Questions and sessions that are remembered; the oldest are forgotten, which costs a look that is not held."""
OK = 200
LARGEST_LOOK = 64 * 1024
"""Bytes of a request that may be held."""

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class News:
    """Counts what came, for nodes and for the coordinator, and wakes who waits for it. For any thread."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._counts = {NODE_PULL: 0, GRID_PULL: 0}
        self._waiting: dict[str, set[tuple[asyncio.AbstractEventLoop, asyncio.Event]]] = {
            NODE_PULL: set(), GRID_PULL: set(),
        }  # fmt: skip
        self._pending: OrderedDict[str, set[str]] = OrderedDict()
        self._seen: OrderedDict[str, int] = OrderedDict()
        self.closed = False

    def tell(self, path: str) -> None:
        """There is something for who asks at ``path``."""
        with self._guard:
            self._counts[path] += 1
            self._wake(path)

    def announced(self, path: str, session: str, parts: "set[str]") -> None:
        """A message was stored of which ``parts`` are still to come."""
        if not parts:
            self.tell(path)
            return
        with self._guard:
            self._pending[session] = parts
            while len(self._pending) > MOST_KNOWN:
                self._pending.popitem(last=False)

    def arrived(self, path: str, session: str, part: str) -> None:
        """One of them came; with the last one there is news."""
        with self._guard:
            parts = self._pending.get(session)
            if parts is None:
                return
            parts.discard(part)
            if parts:
                return
            del self._pending[session]
        self.tell(path)

    def not_there(self, path: str, questions: Iterable[str], count: int = -1) -> None:
        """What was asked for was not there when there had been so much news; by default, now."""
        with self._guard:
            for question in questions:
                self._seen[question] = self._counts[path] if count < 0 else count
                self._seen.move_to_end(question)
            while len(self._seen) > MOST_KNOWN:
                self._seen.popitem(last=False)

    def unanswered(self, path: str, questions: Iterable[str]) -> int | None:
        """The count of news, if none of these can have been answered since they were asked last."""
        with self._guard:
            count = self._counts[path]
            return count if all(self._seen.get(question) == count for question in questions) else None

    def close(self) -> None:
        """Hold nobody any more: the SuperLink ends. May be called from a signal's handler."""
        self.closed = True
        for path in self._waiting:
            self._wake(path)

    def count(self, path: str) -> int:
        """How often there was news."""
        return self._counts[path]

    def held(self) -> int:
        """How many looks are held now."""
        return sum(map(len, self._waiting.values()))

    async def wait(self, path: str, seen: int, gone: "asyncio.Task[Any]", seconds: float) -> None:
        """Until there is more than ``seen``, the asker is gone, or so many seconds are over."""
        event = asyncio.Event()
        entry = (asyncio.get_running_loop(), event)
        with self._guard:
            if self.closed or self._counts[path] != seen:
                return
            self._waiting[path].add(entry)
        news = asyncio.ensure_future(event.wait())
        try:
            await asyncio.wait({news, gone}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            news.cancel()
            self._waiting[path].discard(entry)

    def _wake(self, path: str) -> None:
        for loop, event in tuple(self._waiting[path]):
            loop.call_soon_threadsafe(event.set)


class HeldLooks:
    """The outermost layer of the SuperLink's application (ASGI 3).

    Args:
        app: the layer below.
        news: what there is.
    """

    def __init__(self, app: App, news: News) -> None:
        self._app, self._news = app, news

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hold the request if it is a look that finds nothing new; then let it go on."""
        path = scope.get("path", "")
        if scope["type"] != "http" or path not in (NODE_PULL, GRID_PULL) or self._news.closed:
            await self._app(scope, receive, send)
            return
        read, body = await _read(receive)
        questions = _questions(path, body)
        if not questions:
            await self._app(scope, _again(read, receive), send)
            return
        gone = asyncio.ensure_future(receive())
        try:
            if (seen := self._news.unanswered(path, questions)) is not None and self._news.held() < MOST_HELD:
                await self._news.wait(path, seen, gone, NODE_SECONDS if path == NODE_PULL else GRID_SECONDS)
                if gone.done():  # the asker hung up: nothing must be given to nobody
                    return
            seen, told = self._news.count(path), _Answer(send)
            await self._app(scope, _again(read, lambda: asyncio.shield(gone)), told)
            if told.status == OK and (path == GRID_PULL or not told.size):
                self._news.not_there(path, questions, seen)
        finally:
            gone.cancel()


class _Answer:
    """Passes an answer on, and looks at how it went.

    Attributes:
        status: of HTTP; 0 as long as there is no answer.
        size: bytes of its body; an answer without messages has none.
    """

    def __init__(self, send: Send) -> None:
        self._send = send
        self.status = self.size = 0

    async def __call__(self, part: MutableMapping[str, Any]) -> None:
        if part["type"] == "http.response.start":
            self.status = part["status"]
        elif part["type"] == "http.response.body":
            self.size += len(part.get("body", b""))
        await self._send(part)


def _questions(path: str, body: bytes | None) -> list[str]:
    """What the look asks for: messages for a node, or answers to messages; nothing where that cannot be read."""
    if body is None:
        return []
    try:
        if path == NODE_PULL:
            return [f"node {PullMessagesRequest.FromString(body).node.node_id}"]
        return list(PullAppMessagesRequest.FromString(body).message_ids)
    except DecodeError:
        return []


async def _read(receive: Receive) -> tuple[list[MutableMapping[str, Any]], bytes | None]:
    """The request's parts, and its body; None where that is long, or the asker is gone."""
    read: list[MutableMapping[str, Any]] = []
    body = b""
    while True:
        read.append(await receive())
        if read[-1]["type"] != "http.request":
            return read, None
        body += read[-1].get("body", b"")
        if len(body) > LARGEST_LOOK:
            return read, None
        if not read[-1].get("more_body", False):
            return read, body


def _again(read: list[MutableMapping[str, Any]], receive: Receive) -> Receive:
    """What was read, once more, and then what follows."""
    parts = iter(read)

    async def received() -> MutableMapping[str, Any]:
        for part in parts:
            return part
        return await receive()

    return received

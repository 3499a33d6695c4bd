# SPDX-License-Identifier: Apache-2.0
"""The :class:`Transport` over Flower's Grid: requests to registered nodes, replies as they arrive.

Flower's ``send_and_receive`` looks for replies every three seconds, holds all of them in memory and waits for
ever by default. This transport looks often at first and less often later, fetches one reply at a time, and
yields exactly one reply per site: the site's own, or a :class:`Refusal` with reason ``lost`` (Flower says that
the node is gone), ``timeout`` (it did not answer in time), ``contract-violation`` (it answered with something
else) or the reason that the site's runner gave. Sites go by the name under which their key was registered.

Our SuperLink holds a look until a reply is there (:mod:`.held_looks`); where another one does not, looks become rare by
themselves. Replies are fetched one at a time, those of small models (:data:`~fedneuro.privacy.wire_bytes.MAX_SQUEEZED`)
a few at a time: many sites then cost no more looks than one.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from math import inf

import httpx
from flwr.app import Message
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError

from ..privacy.contract import Arrays, HelloReply, Refusal, Reply, Request
from ..privacy.errors import ContractViolation, EnvironmentProblem, Reason
from ..privacy.pace import Pace
from ..privacy.wire import MESSAGE_TYPES, Packed, decode_reply, encode_request, pack
from ..privacy.wire_bytes import MAX_SQUEEZED, squeeze, unsqueeze

__all__ = ["FlowerTransport", "registered_nodes"]

ONLINE = "online"
HELD_SECONDS = 0.5
"""A look that took longer was held."""
SMALL_AT_ONCE = 16
"""Replies of small models that one look may fetch."""
TTL_MARGIN = 60.0
"""Seconds that a message lives longer than we wait for its reply."""
PUSHES = 3
"""How often a message is sent of which a part is refused."""

_LOST = frozenset(
    {
        ErrorCode.NODE_UNAVAILABLE,
        ErrorCode.CLIENT_APP_CRASHED,
        ErrorCode.MESSAGE_UNAVAILABLE,
        ErrorCode.REPLY_MESSAGE_UNAVAILABLE,
    }
)
_log = logging.getLogger("fedneuro.transport")


def registered_nodes(grid: Grid) -> dict[str, int]:
    """Flower's node id of each node that is online, by registered name.

    Raises:
        EnvironmentProblem: two nodes that are online have the same name.
    """
    found: dict[str, int] = {}
    for node in grid.get_nodes():
        if not node.name or node.status != ONLINE:
            continue
        if node.name in found:
            text = f"two nodes are registered under the name {node.name}; unregister one (flwr supernode unregister)"
            raise EnvironmentProblem(text)
        found[node.name] = node.node_id
    return found


class FlowerTransport:
    """Requests over Flower.

    Args:
        grid: Flower's Grid, as the ServerApp gets it.
        nodes: gives the node id of each site that can be asked; :func:`registered_nodes` by default.
        check: is called between two looks for replies, and may raise to end the exchange.
        cut: is asked between two looks when, by the monotonic clock, the exchange is to end early.
    """

    def __init__(
        self,
        grid: Grid,
        nodes: Callable[[Grid], Mapping[str, int]] = registered_nodes,
        check: Callable[[], None] = lambda: None,
        cut: Callable[[], float] = lambda: inf,
    ) -> None:
        self._grid = grid
        self._nodes = nodes
        self._check = check
        self._cut = cut
        self._largest = 0

    def sites(self) -> list[str]:
        """Names of the nodes that are online, sorted; none while the SuperLink cannot be reached."""
        try:
            return sorted(self._nodes(self._grid))
        except httpx.HTTPError as error:
            _log.error("the SuperLink cannot be reached: %s: %s", type(error).__name__, error)
            return []

    def exchange(self, requests: Mapping[str, Request], timeout: float) -> Iterator[Reply]:
        """Send each site its request and yield one reply per site, as they arrive; seconds of patience."""
        deadline = time.monotonic() + timeout
        pending: dict[str, str] = {}
        try:
            pending, unsent = self._send(requests, timeout)
            for site in unsent:
                yield _refusal(site, requests[site], Reason.LOST)
            queue, pace, at_once = deque(pending), Pace(shortest=0.05, longest=0.25), self._at_once(requests)
            while queue and time.monotonic() < min(deadline, self._cut()):
                self._check()
                asked = time.monotonic()
                messages = deque(self._grid.pull_messages([queue[n] for n in range(min(at_once, len(queue)))]))
                if not messages:
                    queue.rotate(-at_once)
                    if time.monotonic() - asked < HELD_SECONDS:
                        time.sleep(min(pace.pause(), max(0.0, deadline - time.monotonic())))
                    continue
                pace.news()
                while messages:
                    message = messages.popleft()
                    site = pending.pop(message.metadata.reply_to_message_id)
                    queue.remove(message.metadata.reply_to_message_id)
                    yield _read(message, site, requests[site])
                    del message  # the reply's arrays must not outlive their fold
        except httpx.HTTPError as error:
            _log.error("the SuperLink cannot be reached: %s: %s", type(error).__name__, error)
            for site in pending.values() if pending else requests:
                yield _refusal(site, requests[site], Reason.LOST)
            return
        for site in pending.values():
            yield _refusal(site, requests[site], Reason.TIMEOUT)

    def _send(self, requests: Mapping[str, Request], timeout: float) -> tuple[dict[str, str], list[str]]:
        """Push all requests; returns the site of each message id, and the sites that cannot be asked."""
        nodes = self._nodes(self._grid)
        asked = [site for site in requests if site in nodes]
        unsent = [site for site in requests if site not in nodes]
        ready: dict[int, Packed] = {}
        messages = []
        for site in asked:
            request = requests[site]
            content = squeeze(encode_request(request, _packed(request.arrays, ready)))
            messages.append(
                Message(
                    content,
                    dst_node_id=nodes[site],
                    message_type=MESSAGE_TYPES[request.kind],
                    group_id=str(request.round),
                    ttl=timeout + TTL_MARGIN,
                )
            )
        pending: dict[str, str] = {}
        for site, message_id in zip(asked, self._push(messages), strict=True):
            if message_id:
                pending[message_id] = site
            else:
                unsent.append(site)
        return pending, unsent

    def _push(self, messages: list[Message]) -> list[str]:
        """Flower's id of each message, or nothing.

        A part is refused that was sent again after the node had taken all of the message: then the whole is sent
        again, which Flower takes for the same message.
        """
        for _ in range(PUSHES if messages else 0):
            try:
                return list(self._grid.push_messages(messages))
            except ObjectPushError as error:
                _log.warning("a part of a message was not taken: %s", error)
        return [""] * len(messages)

    def _at_once(self, requests: Mapping[str, Request]) -> int:
        """Replies that one look may fetch.

        By the largest model that ever travelled here: a site that holds it already is sent nothing
        (:mod:`.downlink`), and answers with all of it.
        """
        models = {id(request.arrays): request.arrays for request in requests.values() if request.arrays}
        sizes = (sum(array.nbytes for array in arrays.values()) for arrays in models.values())
        self._largest = max(self._largest, *sizes, 0)
        return SMALL_AT_ONCE if self._largest <= MAX_SQUEEZED else 1


def _packed(arrays: Arrays | None, ready: dict[int, Packed]) -> Packed | None:
    """The arrays made ready once, however many sites get them."""
    if arrays is None:
        return None
    if id(arrays) not in ready:
        ready[id(arrays)] = pack(arrays)
    return ready[id(arrays)]


def _read(message: Message, site: str, request: Request) -> Reply:
    """The reply in a message, or a refusal where it is none, or not this site's to this request."""
    if message.has_error():
        return _refusal(site, request, _reason(message))
    try:
        reply = decode_reply(unsqueeze(message.content))
        number = 0 if isinstance(reply, HelloReply) else reply.round
        if reply.site != site or number != request.round:
            raise ContractViolation(f"site {site} answers as {reply.site} for round {number} of {request.round}")
    except ContractViolation as error:
        _log.warning("reply of %s refused: %s", site, error)
        return _refusal(site, request, error.reason)
    return reply


def _reason(message: Message) -> Reason:
    """The reason code in a Flower error; a foreign text is never passed on."""
    if message.error.code in _LOST:
        return Reason.LOST
    try:
        return Reason(message.error.reason or "")
    except ValueError:
        _log.warning("error %s of a node: %.200r", message.error.code, message.error.reason)
        return Reason.INTERNAL


def _refusal(site: str, request: Request, reason: Reason) -> Refusal:
    return Refusal(site=site, kind=request.kind, round=request.round, reason=reason)

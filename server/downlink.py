# SPDX-License-Identifier: Apache-2.0
"""The way down to the sites, on which only what changed travels, and which counts what does.

A site that says so in its *hello* remembers the arrays that it got last. It is then sent those that differ from them,
and the digest of the whole: nothing of the model between an evaluation and the training that starts from the same
weights, no frozen array twice, no normalisation that fedbn keeps at the site. A site that has lost them (it was
restarted) says ``model-not-held`` and is sent everything at once, within the same exchange; one that keeps losing them
(Flower's simulation moves sites between processes) is sent everything from then on. Results do not depend on any of
this: a site starts from the same bits or not at all.
"""

import time
from collections.abc import Iterator, Mapping
from dataclasses import replace

from ..models.state import digest
from ..privacy.contract import Arrays, HelloReply, Refusal, Reply, Request, Transport, payload_bytes
from ..privacy.errors import Reason

__all__ = ["Downlink"]

MISSES = 2
"""Times that a site may have lost what it was sent, before it is sent everything."""


class Downlink:
    """A transport around another one.

    Args:
        transport: how sites are reached.
    """

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._held: dict[str, dict[str, str]] = {}
        self._misses: dict[str, int] = {}
        self._bytes = 0

    def sites(self) -> list[str]:
        """Names of the sites that can be asked now, sorted."""
        return self._transport.sites()

    def taken(self) -> int:
        """Bytes of arrays that went down since the last call."""
        count, self._bytes = self._bytes, 0
        return count

    def exchange(self, requests: Mapping[str, Request], timeout: float) -> Iterator[Reply]:
        """See :class:`~fedneuro.privacy.contract.Transport`. Sites that need the same arrays share them."""
        deadline, wholes = time.monotonic() + timeout, _Wholes()
        slim = {site: self._slimmed(site, request, wholes) for site, request in requests.items()}
        again: dict[str, Request] = {}
        for reply in self._sent(slim, timeout):
            site = reply.site
            if isinstance(reply, Refusal) and reply.reason is Reason.MODEL_NOT_HELD and slim[site].held:
                self._misses[site] = self._misses.get(site, 0) + 1
                again[site] = requests[site]
                continue
            self._learn(reply, requests[site], wholes)
            yield reply
            del reply  # its arrays must not outlive their fold
        if again:
            for reply in self._sent(again, max(0.0, deadline - time.monotonic())):
                self._learn(reply, requests[reply.site], wholes)
                yield reply
                del reply

    def _sent(self, requests: Mapping[str, Request], timeout: float) -> Iterator[Reply]:
        self._bytes += sum(payload_bytes(request.arrays) for request in requests.values())
        return self._transport.exchange(requests, timeout)

    def _slimmed(self, site: str, request: Request, wholes: "_Wholes") -> Request:
        """``request`` less what ``site`` has."""
        if request.arrays is None or not self._held.get(site):
            return request
        whole = wholes.of(request.arrays)
        differ = frozenset(name for name, mark in whole.marks.items() if self._held[site].get(name) != mark)
        # A site puts what came behind what it has: names that it should forget, or another order, need everything.
        has = list(self._held[site])
        if len(differ) == len(whole.marks) or list(whole.marks)[: len(has)] != has:
            return request
        return replace(request, arrays=whole.part(differ), held=whole.digest)

    def _learn(self, reply: Reply, request: Request, wholes: "_Wholes") -> None:
        """Note what the site has now; whatever is in doubt counts as lost."""
        site = reply.site
        if isinstance(reply, HelloReply):
            self._held.pop(site, None)
            if not reply.keeps_model:
                self._misses[site] = MISSES
        elif request.arrays is None:
            return
        elif isinstance(reply, Refusal) or self._misses.get(site, 0) >= MISSES:
            self._held.pop(site, None)
        else:
            self._held[site] = wholes.of(request.arrays).marks


class _Whole:
    """Arrays that go down, with the digest of all and of each."""

    def __init__(self, arrays: Arrays) -> None:
        self._arrays = arrays
        self._parts: dict[frozenset[str], Arrays] = {}
        self.digest = digest(arrays)
        self.marks = {name: digest({name: array}) for name, array in arrays.items()}

    def part(self, names: frozenset[str]) -> Arrays | None:
        """Those of these names; the same object for all sites, so that it is made ready to travel once."""
        if not names:
            return None
        if names not in self._parts:
            self._parts[names] = {name: array for name, array in self._arrays.items() if name in names}
        return self._parts[names]


class _Wholes:
    """The arrays of one exchange; most sites share theirs."""

    def __init__(self) -> None:
        self._known: dict[int, _Whole] = {}

    def of(self, arrays: Arrays) -> _Whole:
        """``arrays`` with their digests."""
        if id(arrays) not in self._known:
            self._known[id(arrays)] = _Whole(arrays)
        return self._known[id(arrays)]

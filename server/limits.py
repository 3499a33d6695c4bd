# SPDX-License-Identifier: Apache-2.0
"""Who may knock how often: rate limit and lockout of the enrolment service, by network address.

A token has 256 bits, so guessing cannot succeed; the limits keep a guesser from costing anything and make one
visible in the log. They hold per address: a guesser elsewhere locks no hospital out.
"""

import ipaddress
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field

from ..privacy.errors import Refused

__all__ = ["Doorkeeper", "TooMany", "peer_address"]

MAX_ADDRESSES = 10_000
"""Addresses remembered; the one that was quiet longest is forgotten first."""


class TooMany(Refused):
    """The address calls too often, or failed too often."""


@dataclass(slots=True)
class _Caller:
    calls: deque[float] = field(default_factory=deque)
    failures: deque[float] = field(default_factory=deque)
    locked_until: float = 0.0


class Doorkeeper:
    """Counts calls and failures of each address.

    Args:
        calls: calls per ``window``.
        failures: failed calls per ``lockout`` before the address is locked out.
        window: seconds.
        lockout: seconds for which an address is refused after so many failures.
        clock: seconds that only grow.
    """

    def __init__(
        self,
        calls: int = 30,
        failures: int = 5,
        window: float = 60.0,
        lockout: float = 900.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limits = calls, failures
        self._window, self._lockout, self._clock = window, lockout, clock
        self._callers: OrderedDict[str, _Caller] = OrderedDict()
        self._lock = threading.Lock()

    def admit(self, address: str) -> None:
        """Count a call.

        Raises:
            TooMany: the address calls too often, or is locked out.
        """
        with self._lock:
            caller, now = self._caller(address), self._clock()
            if now < caller.locked_until:
                raise TooMany(f"too many failed attempts; wait {caller.locked_until - now:.0f} s")
            _forget(caller.calls, now - self._window)
            if len(caller.calls) >= self._limits[0]:
                raise TooMany(f"too many calls; at most {self._limits[0]} in {self._window:.0f} s")
            caller.calls.append(now)

    def failed(self, address: str) -> bool:
        """Count a failure; True if it locks the address out."""
        with self._lock:
            caller, now = self._caller(address), self._clock()
            _forget(caller.failures, now - self._lockout)
            caller.failures.append(now)
            if len(caller.failures) < self._limits[1]:
                return False
            caller.failures.clear()
            caller.locked_until = now + self._lockout
            return True

    def _caller(self, address: str) -> _Caller:
        caller = self._callers.pop(address, None) or _Caller()
        self._callers[address] = caller
        if len(self._callers) > MAX_ADDRESSES:
            self._callers.popitem(last=False)
        return caller


def peer_address(peer: str) -> str:
    """The address in what gRPC calls a peer (``ipv4:192.0.2.1:4711``); of IPv6 the /64 that one caller owns."""
    text = peer.partition(":")[2].rpartition(":")[0].replace("%5B", "").replace("%5D", "").strip("[]")
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return peer[:100]
    if isinstance(address, ipaddress.IPv6Address):
        return str(ipaddress.ip_network((address, 64), strict=False))
    return str(address)


def _forget(times: deque[float], before: float) -> None:
    while times and times[0] <= before:
        times.popleft()

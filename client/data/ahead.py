# SPDX-License-Identifier: Apache-2.0
"""Makes the next crops while the network computes, in a thread of its own: numpy and torch let go of Python's lock.

The items are made one after the other by one thread, so their order, and what a generator draws for them, is as without
it. That holds as long as nobody else draws from the same generator meanwhile.
"""

import queue
import threading
from collections.abc import Iterable, Iterator
from typing import Final, TypeVar

__all__ = ["ahead"]

T = TypeVar("T")
DEPTH: Final = 2
"""Items that wait at most: memory for two batches."""
_END: Final = object()
_WAIT_SECONDS: Final = 0.1


def ahead(items: Iterable[T], depth: int = DEPTH) -> Iterator[T]:
    """The same items, made ahead of time.

    Args:
        items: what is made; consumed by another thread.
        depth: how many may wait, at least 1.

    Raises:
        BaseException: what making an item raised, in its place.
    """
    ready: queue.Queue[object] = queue.Queue(depth)
    stop, faults = threading.Event(), list[BaseException]()

    def offer(item: object) -> bool:
        while not stop.is_set():
            try:
                ready.put(item, timeout=_WAIT_SECONDS)
            except queue.Full:
                continue
            return True
        return False

    def make() -> None:
        try:
            for item in items:
                if not offer(item):
                    return
        except BaseException as error:
            faults.append(error)
        offer(_END)

    thread = threading.Thread(target=make, name="crops", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not _END:
            yield item  # type: ignore[misc]
        if faults:
            raise faults[0]
    finally:
        stop.set()
        thread.join()

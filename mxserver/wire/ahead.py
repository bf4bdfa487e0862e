"""Making the next item while the current one is worked on."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import NamedTuple, TypeVar

T = TypeVar("T")


class _End(NamedTuple):
    error: BaseException | None


def made_ahead(source: Iterator[T], count: int, name: str) -> Iterator[T]:
    """The items of `source`, made by a thread of their own; at most `count` exist at once, with the one that the
    caller works on. What `source` raises is raised here, in its turn.

    When it is closed early the thread ends after the item that it is making, and is not waited for: a disk or a
    network that does not answer must not hold up the caller.
    """
    room = threading.Semaphore(count)
    ready: queue.SimpleQueue[T | _End] = queue.SimpleQueue()
    left = threading.Event()

    def make() -> None:
        error = None
        try:
            room.acquire()
            for item in source:
                ready.put(item)
                del item
                room.acquire()
                if left.is_set():
                    break
        except BaseException as raised:  # noqa: BLE001 - raised again where the items are taken
            error = raised
        ready.put(_End(error))

    threading.Thread(target=make, name=name, daemon=True).start()
    try:
        while not isinstance(item := ready.get(), _End):
            yield item
            del item
            room.release()
        if item.error is not None:
            raise item.error
    finally:
        left.set()
        room.release()

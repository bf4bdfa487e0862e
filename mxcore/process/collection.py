"""Python's collector of cyclic garbage, kept from looking through a process while a long plan is made."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collection_paused() -> Iterator[None]:
    """No automatic collection within: tens of thousands of new tuples, none of them garbage, start one after the other.

    Of this process, so for what takes milliseconds. Another thread that leaves its own pause meanwhile ends this one:
    then a collection may come after all. A collector that was off stays off.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()

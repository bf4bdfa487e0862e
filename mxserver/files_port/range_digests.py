"""Digests of parts of files, made once: what many workers ask for is hashed for the first of them."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable

import xxhash

BLOCK_BYTES = 256 * 1024  # fits in a core's cache: the second look at a block costs little
MOST_DIGESTS = 65_536  # 512 GiB in parts of 8 MiB; about 16 MiB of memory


class RangeDigests:
    """XXH3-64 of parts of files, kept while a file's inode, size and times stay what they were. Thread-safe.

    A digest that is remembered is of the bytes as they were read first. Where the disk or the memory gives other bytes
    later, they do not fit it: their receiver sees that, and has it made afresh.
    """

    def __init__(self, most: int = MOST_DIGESTS) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._made: OrderedDict[tuple[int, ...], str] = OrderedDict()

    def of(self, handle: int, begin: int, end: int, *, afresh: bool = False) -> str:
        """Of the bytes [begin, end) of an open file, in hex; `afresh`: whatever is remembered. Raises OSError."""
        found = os.fstat(handle)
        times = found.st_mtime_ns, found.st_ctime_ns
        key = (found.st_dev, found.st_ino, found.st_size, *times, begin, end)
        with self._lock:
            if not afresh and (known := self._made.get(key)) is not None:
                self._made.move_to_end(key)
                return known
        hasher = xxhash.xxh3_64()
        read_blocks(handle, begin, end, hasher.update)
        made: str = hasher.hexdigest()
        with self._lock:
            self._made[key] = made
            while len(self._made) > self._most:
                self._made.popitem(last=False)
        return made


def read_blocks(handle: int, begin: int, end: int, take: Callable[[memoryview], object]) -> int:
    """Calls `take` with the bytes [begin, end) of a file, block by block in one buffer; returns how many there were:
    fewer where the file ends early. Raises OSError.
    """
    block = memoryview(bytearray(min(BLOCK_BYTES, end - begin)))
    at = begin
    while at < end and (count := os.preadv(handle, [block[: end - at]], at)):
        take(block[:count])
        at += count
    return at - begin

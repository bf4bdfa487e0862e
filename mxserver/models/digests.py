"""Digests of files: what the origin promises (SHA-256, git's SHA-1), and ours (XXH3-64) for streams and validation."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable

import xxhash

READ_BYTES = 4 * 1024 * 1024
PREFIX = "xxh3-64:"


def _nothing(_: int) -> None:
    pass


def digest_fd(handle: int, *others: hashlib._Hash, progress: Callable[[int], None] = _nothing) -> tuple[int, str]:
    """Reads a file from its beginning: its bytes, and its digest as `xxh3-64:HEX`; feeds `others` too.

    `progress` is called with the bytes of each step, and may raise to stop.
    """
    ours = xxhash.xxh3_64()
    buffer = bytearray(READ_BYTES)
    view = memoryview(buffer)
    size = 0
    while count := os.preadv(handle, [buffer], size):
        part = view[:count]
        ours.update(part)
        for other in others:
            other.update(part)
        size += count
        progress(count)
    return size, PREFIX + ours.hexdigest()


def git_blob_sha1(size: int) -> hashlib._Hash:
    """The hash that git names a file's content by, to be fed with it."""
    return hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)

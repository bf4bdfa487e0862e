"""A file that arrives in pieces: beside its final place until it is complete and checked, resumed after a break."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import NamedTuple

import xxhash

from mxserver.wire.errors import FileRefused
from mxserver.wire.relative_path import rename_below

DIGEST_PREFIX = "xxh3-64:"
_READ_BYTES = 4 * 1024 * 1024


class FileInfo(NamedTuple):
    """A file of a model: its name, its bytes, and its digest as `xxh3-64:HEX` ("" when the server knows none)."""

    path: str
    size: int
    digest: str


def has_content(path: Path, info: FileInfo) -> bool:
    """Whether a regular file with these bytes is there; without a digest, whether it has the size."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        if os.fstat(handle).st_size != info.size:
            return False
        hasher = xxhash.xxh3_64()
        _hash_up_to(handle, info.size, hasher)
        return info.digest in ("", DIGEST_PREFIX + hasher.hexdigest())
    finally:
        os.close(handle)


def _hash_up_to(handle: int, end: int, hasher: xxhash.xxh3_64) -> int:
    """Hashes a file from its beginning; returns the number of bytes."""
    buffer = bytearray(_READ_BYTES)
    view = memoryview(buffer)
    offset = 0
    while offset < end and (count := os.preadv(handle, [view[: end - offset]], offset)):
        hasher.update(view[:count])
        offset += count
    return offset


def partial_path(info: FileInfo, beside: Path) -> Path:
    """Where an incomplete file lies; the place depends on the expected content."""
    known = "\n".join((info.path, str(info.size), info.digest)).encode("utf-8", "surrogatepass")
    return beside / hashlib.sha256(known).hexdigest()[:32]


class PartialFile:
    """One arriving file. Not thread-safe. `close` must be called; received bytes stay for the next attempt."""

    def __init__(self, info: FileInfo, beside: Path) -> None:
        """`beside`: a folder on the same file system as the final place. Raises OSError."""
        self.info = info
        self._path = partial_path(info, beside)
        self._handle = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        self._hasher = xxhash.xxh3_64()
        self.offset = 0
        if info.digest:  # without a digest, nobody could tell whether these bytes are the start of this file
            self.offset = _hash_up_to(self._handle, info.size, self._hasher)
        os.ftruncate(self._handle, self.offset)

    def append(self, data: memoryview) -> None:
        """Raises FileRefused when more comes than the file has."""
        if self.offset + len(data) > self.info.size:
            raise FileRefused(f"{self.info.path} has {self.info.size} bytes, but the server sent more")
        self._hasher.update(data)
        while data:
            written = os.pwrite(self._handle, data, self.offset)
            self.offset += written
            data = data[written:]

    def restart(self) -> None:
        """Drops the received bytes."""
        os.ftruncate(self._handle, 0)
        self.offset = 0
        self._hasher.reset()

    def finish(self, folder: Path) -> None:
        """Gives the file its final name below `folder`, once it is known to be right and on the disk.

        Raises:
            FileRefused: its size or digest is wrong; the received bytes are dropped.
        """
        digest = DIGEST_PREFIX + self._hasher.hexdigest()
        if self.offset != self.info.size or self.info.digest not in ("", digest):
            came, self.offset = self.offset, 0
            self.restart()
            raise FileRefused(
                f"{self.info.path} has {came} bytes and digest {digest}; the server lists {self.info.size} and "
                f"{self.info.digest or 'no digest'}"
            )
        os.fsync(self._handle)
        self.close()
        rename_below(self._path, folder, self.info.path)

    def close(self) -> None:
        """Idempotent."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

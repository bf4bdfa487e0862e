"""What tells whether a file is still the one whose header was read, with the same bytes in it."""

from __future__ import annotations

import os
from typing import NamedTuple

__all__ = ["FileStamp", "is_changed", "stamp_of"]

_SAMPLE_BYTES = 4096


class FileStamp(NamedTuple):
    """Of a file when it was opened. `samples` are bytes of its middle and its end; None where they cannot be read."""

    size_bytes: int
    modified_ns: int
    changed_ns: int  # when anything of it was changed last, its name and links among it: nobody can set that
    inode: int
    samples: bytes | None


def stamp_of(handle: int) -> FileStamp:
    """Of an open file. Raises OSError."""
    found = os.fstat(handle)
    return FileStamp(found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino, _samples(handle, found.st_size))


def is_changed(before: FileStamp, handle: int) -> bool:
    """Whether the bytes of what is open may be others than then. Raises OSError.

    Size and the time of the last write can be set back (`touch -r`; packers that give all files one time). The time of
    the last change cannot: where it is another one the file was replaced, if its inode is another one too, or else
    written to, linked or renamed, of which samples of its bytes tell the first.
    """
    found = os.fstat(handle)
    if (found.st_size, found.st_mtime_ns) != before[:2]:
        return True
    if found.st_ctime_ns == before.changed_ns:
        return False
    if found.st_ino != before.inode:
        return True
    now = _samples(handle, found.st_size)
    return None not in (before.samples, now) and now != before.samples


def _samples(handle: int, size_bytes: int) -> bytes | None:
    try:
        middle = os.pread(handle, _SAMPLE_BYTES, size_bytes // 2)
        return middle + os.pread(handle, _SAMPLE_BYTES, max(0, size_bytes - _SAMPLE_BYTES))
    except OSError:
        return None

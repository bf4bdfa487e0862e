"""Disk room for files from elsewhere: checked before the first byte, reported when it runs out."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mxserver.wire.errors import DiskFull

__all__ = ["check_room", "full_disk_is_told"]

_FULL = (errno.ENOSPC, errno.EDQUOT)


def check_room(folder: Path, wanted_bytes: int) -> None:
    """Raises DiskFull where the file system of `folder`, which must be there, has fewer bytes free than wanted."""
    free_bytes = _free_bytes(folder)
    if free_bytes is not None and free_bytes < wanted_bytes:
        raise _full(folder, wanted_bytes, free_bytes, "")


@contextmanager
def full_disk_is_told(folder: Path, wanted_bytes: int) -> Iterator[None]:
    """Turns the OSError of a full disk, or of a quota that is used up, into DiskFull; others pass."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise _full(folder, wanted_bytes, _free_bytes(folder), f" ({error.strerror})") from error


def _free_bytes(folder: Path) -> int | None:
    """How many bytes this user may still write; None for file systems that do not say."""
    try:
        found = os.statvfs(folder)
    except OSError:
        return None
    return found.f_bavail * found.f_frsize if found.f_blocks else None


def _full(folder: Path, wanted_bytes: int, free_bytes: int | None, said: str) -> DiskFull:
    free = "an unknown number" if free_bytes is None else str(free_bytes)
    return DiskFull(
        f"{folder}: {wanted_bytes} bytes are to be written, and {free} are free{said}: make room, or name another "
        "folder"
    )

"""File names from the network: which may become a path below a folder, and how to use it without leaving the folder.

Used on both sides: the server does not trust hubs and clients, and clients do not trust servers.
"""

from __future__ import annotations

import os
import re
import stat
from contextlib import suppress
from pathlib import Path

MAX_PATH_BYTES = 1024
MAX_NAME_BYTES = 255

# Windows' rules apply too: a cache folder may be shared with, or copied to, such a machine.
_DRIVE = re.compile(r"[A-Za-z]:")
_RESERVED = re.compile(r"(con|prn|aux|nul|com[0-9¹²³]|lpt[0-9¹²³]|conin\$|conout\$)(\..*)?", re.IGNORECASE)


def path_problem(name: str, longest_bytes: int = MAX_PATH_BYTES) -> str | None:
    """Why `name` cannot be a path below a folder, with `/` between its parts; None if it can.

    Refused: empty names and parts, `.` and `..`, absolute paths, drives, backslashes, colons, control characters,
    lone surrogates, names that Windows reserves or cuts short, and names that are too long.
    """
    try:
        encoded = name.encode()
    except UnicodeEncodeError:
        return "it is not valid Unicode"
    if not name:
        return "it is empty"
    if len(encoded) > longest_bytes:
        return f"it is longer than {longest_bytes} bytes"
    if any(ord(char) < 32 or ord(char) == 127 for char in name):
        return "it has control characters"
    if "\\" in name:
        return "it has a backslash"
    if name.startswith("/") or _DRIVE.match(name):
        return "it is absolute"
    if ":" in name:
        return "it has a colon"
    return next((problem for part in name.split("/") if (problem := _part_problem(part))), None)


def _part_problem(part: str) -> str | None:
    if part in ("", ".", ".."):
        return f"it has the part {part!r}"
    if len(part.encode()) > MAX_NAME_BYTES:
        return f"a part of it is longer than {MAX_NAME_BYTES} bytes"
    if part.endswith((".", " ")) or _RESERVED.fullmatch(part):
        return f"the part {part!r} has a meaning of its own on Windows"
    return None


def rename_below(source: Path, folder: Path, name: str) -> None:
    """Renames a file to `name` (checked by `path_problem`) below `folder`, following no symbolic link on the way;
    folders are made as needed. What has the name is replaced, also when it is a link.

    Raises:
        OSError: as rename does; ELOOP or ENOTDIR where a folder on the way is a link.
    """
    *parents, last = name.split("/")
    at = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for part in parents:
            with suppress(FileExistsError):
                os.mkdir(part, dir_fd=at)
            inner = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=at)
            os.close(at)
            at = inner
        os.rename(source, last, dst_dir_fd=at)
        os.fsync(at)
    finally:
        os.close(at)


def open_regular_below(folder: Path, path: Path) -> int:
    """Opens a file for reading whose real place, all links followed, must lie below `folder`.

    A hub snapshot is made of links into ../../blobs: right as long as they stay in the repository's folder.

    Raises:
        OSError: as open does.
        PermissionError: a link leads out, or it is no regular file.
    """
    root = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        found = os.open(path, os.O_PATH | os.O_CLOEXEC)  # this opens no device and waits for no pipe
        try:
            if not _place(found).startswith(_place(root).rstrip("/") + "/"):
                raise PermissionError(f"{path} leads out of {folder}")
            if not stat.S_ISREG(os.fstat(found).st_mode):
                raise PermissionError(f"{path} is no regular file")
            return os.open(f"/proc/self/fd/{found}", os.O_RDONLY | os.O_CLOEXEC)
        finally:
            os.close(found)
    finally:
        os.close(root)


def _place(handle: int) -> str:
    """Where an open file really is, as the kernel knows it: realpath would look at each folder on the way."""
    return os.readlink(f"/proc/self/fd/{handle}")  # noqa: PTH115 - Path costs as much as all the rest

"""Names for files and folders that are being made: of their own over threads, processes, containers and hosts."""

from __future__ import annotations

import re
import shutil
import time
import uuid
from contextlib import suppress
from pathlib import Path

BEGIN = ".mx-"
ABANDONED_SECONDS = 86_400

_MADE = re.compile(re.escape(BEGIN) + "[0-9a-f]{32}")


def unique_beside(path: Path) -> Path:
    """A name in the folder of `path` that nobody else has: to be filled there, and renamed to `path` once it is whole.

    Random: a process id is none, because in containers everybody has 1. Short, so that it fits beside any name.
    """
    return path.with_name(f"{BEGIN}{uuid.uuid4().hex}")


def remove_leftovers(folder: Path) -> None:
    """Removes what processes that were killed left of `unique_beside` in a folder: what nobody touched for a day."""
    with suppress(OSError):
        for path in folder.iterdir():
            if not _MADE.fullmatch(path.name):
                continue
            with suppress(OSError):
                if time.time() - path.lstat().st_mtime > ABANDONED_SECONDS:
                    if path.is_dir() and not path.is_symlink():
                        shutil.rmtree(path, ignore_errors=True)
                    else:
                        path.unlink()

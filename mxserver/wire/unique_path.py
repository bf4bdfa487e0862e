"""Names for files and folders that are being made: of their own over threads, processes, containers and hosts."""

from __future__ import annotations

import uuid
from pathlib import Path

BEGIN = ".mx-"


def unique_beside(path: Path) -> Path:
    """A name in the folder of `path` that nobody else has: to be filled there, and renamed to `path` once it is whole.

    Random: a process id is none, because in containers everybody has 1. Short, so that it fits beside any name.
    """
    return path.with_name(f"{BEGIN}{uuid.uuid4().hex}")

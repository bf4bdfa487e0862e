"""A file system of a few MiB, as a disk that can be full."""

from __future__ import annotations

import errno
import os
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest


class SmallDisk:
    """A tmpfs at `folder`, mounted as a context manager; the test is skipped where that is not permitted."""

    def __init__(self, folder: Path, size: str = "8m") -> None:
        self.folder = folder
        self._size = size

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        mounted = self._mount(f"size={self._size}")
        if mounted.returncode:
            pytest.skip(f"mounting a small tmpfs is not permitted here: {mounted.stderr.strip()}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        subprocess.run(["umount", "-l", str(self.folder)], check=True)

    def _mount(self, options: str) -> subprocess.CompletedProcess[str]:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(self.folder)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    def resize(self, size: str) -> None:
        """Another size; what is there stays."""
        self._mount(f"remount,size={size}").check_returncode()

    def read_only(self, on: bool) -> None:
        """As an image's file system; what is there stays."""
        self._mount("remount,ro" if on else "remount,rw").check_returncode()

    @property
    def free_bytes(self) -> int:
        found = os.statvfs(self.folder)
        return found.f_bavail * found.f_frsize

    def fill(self, leave_bytes: int) -> Path:
        """A file of somebody else, which leaves so many bytes free; none where others write at the same time."""
        foreign = self.folder / "foreign"
        try:
            foreign.write_bytes(b"x" * (self.free_bytes - leave_bytes))
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
        return foreign

"""A cgroup of one's own with a memory limit, as a container has."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path("/sys/fs/cgroup")


class MemoryGroup(NamedTuple):
    """`launcher` is a command that becomes, in the group, the one that follows it."""

    folder: Path

    @property
    def launcher(self) -> tuple[str, ...]:
        return ("sh", "-ec", f'echo $$ > {self.folder / "cgroup.procs"}; exec "$0" "$@"')

    def kills(self) -> int:
        """How many of its processes the kernel has killed for their memory."""
        for name in ("memory.events", "memory.oom_control"):
            if (file := self.folder / name).exists():
                return int(dict(line.split() for line in file.read_text().splitlines())["oom_kill"])
        raise AssertionError(f"{self.folder} counts nothing")


@contextmanager
def memory_group(limit_bytes: int) -> Iterator[MemoryGroup]:
    """Skips where this user may make none. Its processes have to have ended at the end."""
    parent = ROOT / "memory" if (ROOT / "memory").is_dir() else ROOT
    folder = parent / f"mx-test-{uuid.uuid4()}"
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"no cgroup of one's own here: {error}")
    try:
        limit = folder / ("memory.limit_in_bytes" if parent != ROOT else "memory.max")
        try:
            limit.write_text(str(limit_bytes))
        except OSError as error:
            pytest.skip(f"no memory limit of one's own here: {error}")
        yield MemoryGroup(folder)
    finally:
        folder.rmdir()

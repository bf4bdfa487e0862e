"""How much host memory reading may hold at once, beside the destinations: one ceiling for the process.

MX_HOST_MEMORY_LIMIT, or a quarter of what the cgroup, or the machine, leaves when first asked. Rings, batches of a
stream and pinned memory count while they are held; an arena is a destination and does not.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

from mxcore.errors import HostMemoryLimit
from mxserver.wire import environment

__all__ = ["MemoryBudget", "available_bytes", "budget", "parse_bytes"]

_log = logging.getLogger(__name__)

SETTING = "MX_HOST_MEMORY_LIMIT"
_SHARE = 4
_UNITS = {"": 1, "K": 1000, "M": 1000**2, "G": 1000**3, "T": 1000**4}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", re.IGNORECASE)


def parse_bytes(text: str) -> int:
    """A size such as `8GiB`, `500MB` or `1073741824`; raises ValueError for anything else and for less than 1."""
    match = _SIZE.fullmatch(text.strip())
    if match is None or (match[3] and not match[2]):
        raise ValueError(f"{text!r} is no size such as 8GiB")
    unit = match[2].upper()
    base = 1024 ** " KMGT".index(unit or " ") if match[3] else _UNITS[unit]
    size_bytes = int(float(match[1]) * base)
    if size_bytes < 1:
        raise ValueError(f"{text!r} is no size such as 8GiB")
    return size_bytes


def available_bytes(root: Path = Path("/")) -> int:
    """What this process may still take: the least that a cgroup above it (v2 or v1) or the machine leaves."""
    rooms = [_meminfo(root)]
    for line in _lines(root / "proc/self/cgroup"):
        number, controllers, path = line.split(":", 2)
        if number == "0" and not controllers:
            rooms += _rooms(root / "sys/fs/cgroup", path, "memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            files = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            rooms += _rooms(root / "sys/fs/cgroup/memory", path, *files)
    return max(0, min(rooms))


def _rooms(mount: Path, path: str, limit_file: str, used_file: str, cache_key: str) -> Iterator[int]:
    """What each group from `path` up to the mount leaves; in a container the own group is the mount itself."""
    place = mount / path.lstrip("/")
    for folder in {place, *place.parents, mount}:
        if folder == mount or mount in folder.parents:
            limit, used = _number(folder / limit_file), _number(folder / used_file)
            if limit is not None and used is not None:
                cached = next(
                    (
                        int(line.split()[1])
                        for line in _lines(folder / "memory.stat")
                        if line.startswith(cache_key + " ")
                    ),
                    0,
                )
                yield limit - used + cached


def _meminfo(root: Path) -> int:
    for line in _lines(root / "proc/meminfo"):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _number(file: Path) -> int | None:
    text = "".join(_lines(file)).strip()
    return int(text) if text.isdigit() else None  # "max" is none


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text().splitlines()
    except OSError:
        return []


class MemoryBudget:
    """A ceiling, and what of it is held. Safe from any thread."""

    def __init__(self, limit_bytes: int, origin: str) -> None:
        self.limit_bytes = limit_bytes
        self.origin = origin
        self._held_bytes = 0
        self._lock = threading.Lock()

    @property
    def held_bytes(self) -> int:
        """What is held now."""
        return self._held_bytes

    @property
    def free_bytes(self) -> int:
        """What may still be held."""
        return max(0, self.limit_bytes - self._held_bytes)

    def take(self, size_bytes: int, what: str) -> None:
        """Counts memory that is about to be allocated; raises HostMemoryLimit if it would go beyond the ceiling."""
        with self._lock:
            if self._held_bytes + size_bytes > self.limit_bytes:
                raise HostMemoryLimit(
                    f"{what} wants {size_bytes} bytes of host memory; {self._held_bytes} are held and the limit is "
                    f"{self.limit_bytes} ({self.origin}): raise {SETTING}"
                )
            self._held_bytes += size_bytes

    def give_back(self, size_bytes: int) -> None:
        """What `take` counted is freed."""
        with self._lock:
            self._held_bytes -= size_bytes

    def set_limit(self, limit_bytes: int, origin: str) -> None:
        """Another ceiling from now on; what is held stays held."""
        with self._lock:
            self.limit_bytes, self.origin = limit_bytes, origin

    @contextlib.contextmanager
    def held(self, size_bytes: int, what: str) -> Iterator[None]:
        """`take` and `give_back`."""
        self.take(size_bytes, what)
        try:
            yield
        finally:
            self.give_back(size_bytes)


def _from_environment(environ: Mapping[str, str]) -> MemoryBudget:
    text = environment.setting(environ, SETTING)
    if text is not None:
        try:
            return MemoryBudget(parse_bytes(text), SETTING)
        except ValueError as error:
            _log.warning("%s: %s; a quarter of what is left is the limit", SETTING, error)
    return MemoryBudget(max(64 << 20, available_bytes() // _SHARE), "a quarter of what the machine or its cgroup left")


_lock = threading.Lock()
_budget: MemoryBudget | None = None


def budget() -> MemoryBudget:
    """This process' budget; the environment is read at the first call."""
    global _budget
    with _lock:
        if _budget is None:
            _budget = _from_environment(os.environ)
        return _budget

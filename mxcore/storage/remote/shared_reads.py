"""Ranks of one node that read the same checkpoint share the reading: one fetches a batch, the others copy it.

Batches lie in shared memory, each under a lock that ends with its owner, so that a rank that dies leaves its batch to
the next one. Nothing here is collective: a rank that is late, alone or gone costs the others a bounded wait, and then
each reads for itself. What is read is the same in every case.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import logging
import mmap
import os
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from mxcore.storage.plan import available_bytes, budget
from mxcore.storage.remote.remote_folder import RemoteFile, RemoteRange
from mxserver.wire import unique_beside

__all__ = ["SHARED_BATCH_BYTES", "SharedReads"]

SHARED_BATCH_BYTES = 64 * 1024 * 1024
"""What a batch should be at most: all ranks must cut alike."""
LINGER_SECONDS = 120.0  # how long batches wait for ranks that have not come
WAIT_SECONDS = 60.0  # for room
_PREFIX = "mx-reads-"
_PAUSE_SECONDS = 0.02
_MOST_ROOM_BYTES = 4 << 30

_log = logging.getLogger(__name__)

Read = Callable[[Sequence[RemoteRange]], None]


class SharedReads:
    """One rank's part. `ranks` of this node, children of one process, are expected to read the same files.

    One thread at a time; `close` must be called.
    """

    def __init__(
        self,
        name: str,
        files: Sequence[RemoteFile],
        ranks: int,
        read: Read,
        *,
        below: Path = Path("/dev/shm"),  # noqa: S108 - shared memory, in a folder of this user's own
        room_bytes: int | None = None,
    ) -> None:
        self._ranks = ranks
        self._read = read
        self._folder: Path | None = None
        self._alive = -1
        self._alone = True
        self._made: list[Path] = []
        self._rank = uuid.uuid4().hex  # in containers every rank may have the process id 1
        self.shared_bytes = 0  # that another rank had fetched
        if ranks < 2:
            return
        what = "\n".join([name, str(os.getppid()), str(os.getuid()), *map(repr, files)])
        folder = below / f"{_PREFIX}{os.getuid()}-{hashlib.sha256(what.encode()).hexdigest()[:24]}"
        try:
            _sweep(below)
            folder.mkdir(mode=0o700, exist_ok=True)
            if folder.stat().st_uid != os.getuid() or folder.is_symlink():
                raise PermissionError(f"{folder} belongs to somebody else")
            self._alive = os.open(folder / "alive", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._alive, fcntl.LOCK_SH)
            self._room_bytes = self._free_room(below) if room_bytes is None else room_bytes
        except OSError as error:
            _log.warning("ranks of this node do not share their reading, each reads all: %s", error)
            return
        self._folder = folder
        self._alone = False

    def _free_room(self, below: Path) -> int:
        """What all ranks together may hold there: it is host memory, of which each has a limit, and the cgroup one."""
        memory = min(budget().limit_bytes, available_bytes() // 2)
        return min(_MOST_ROOM_BYTES, shutil.disk_usage(below).free // 2, memory)

    def read_into(self, ranges: Sequence[RemoteRange]) -> None:
        """As the folder's own `read_into`; raises what that raises."""
        size_bytes = sum(part.length for part in ranges)
        if self._alone or not size_bytes:
            self._read(ranges)
            return
        key = hashlib.sha256(repr([part[:3] for part in ranges]).encode()).hexdigest()[:24]
        try:
            with self._locked(key):
                if not self._take(key, ranges, size_bytes):
                    self._fetch(key, ranges, size_bytes)
        except OSError as error:
            _log.warning("this rank reads on for itself: %s", error)
            self._alone = True
            self._read(ranges)

    def _place(self, key: str) -> Path:
        if self._folder is None:
            raise FileNotFoundError("nothing is shared")
        return self._folder / f"{key}.batch"

    @contextmanager
    def _locked(self, key: str) -> Iterator[None]:
        handle = os.open(self._place(key).with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)

    def _take(self, key: str, ranges: Sequence[RemoteRange], size_bytes: int) -> bool:
        try:
            handle = os.open(self._place(key), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            with mmap.mmap(handle, size_bytes, access=mmap.ACCESS_COPY) as mapped:
                _copy_out(mapped, ranges)
        finally:
            os.close(handle)
        self.shared_bytes += size_bytes
        self._used(key)
        return True

    def _fetch(self, key: str, ranges: Sequence[RemoteRange], size_bytes: int) -> None:
        self._wait_for_room(size_bytes)
        place = self._place(key)
        beside = unique_beside(place)
        handle = os.open(beside, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(handle, 0, size_bytes)
            with mmap.mmap(handle, size_bytes) as mapped:
                self._read(_moved(ranges, _address(mapped)))
                _copy_out(mapped, ranges)
            self._made.append(place)
            beside.replace(place)
        finally:
            os.close(handle)
            beside.unlink(missing_ok=True)
        self._used(key)

    def _used(self, key: str) -> None:
        """This rank has it; the last one removes it."""
        place = self._place(key)
        place.with_suffix(f".used-{self._rank}").touch()
        marks = list(place.parent.glob(f"{key}.used-*"))
        if len(marks) >= self._ranks:
            for path in (place, *marks):
                path.unlink(missing_ok=True)

    def _wait_for_room(self, size_bytes: int) -> None:
        deadline = time.monotonic() + WAIT_SECONDS
        while self._held_bytes() + size_bytes > self._room_bytes:
            if size_bytes > self._room_bytes or time.monotonic() > deadline:
                raise OSError(f"no room for {size_bytes} bytes that other ranks could copy ({self._room_bytes} in all)")
            time.sleep(_PAUSE_SECONDS)

    def _held_bytes(self) -> int:
        held = 0
        for path in self._place("any").parent.glob("*.batch"):
            with suppress(FileNotFoundError):
                held += path.stat().st_size
        return held

    def close(self) -> None:
        """What other ranks still want stays for a while, and no longer than this process. Idempotent."""
        folder, self._folder = self._folder, None
        alive, self._alive = self._alive, -1
        if alive < 0:
            return
        if folder is None or not any(path.exists() for path in self._made):
            os.close(alive)
            _remove_if_dead(folder)
            return
        threading.Thread(target=self._linger, args=(folder, alive), name="mx-shared-reads", daemon=True).start()

    def _linger(self, folder: Path, alive: int) -> None:
        deadline = time.monotonic() + LINGER_SECONDS
        while time.monotonic() < deadline and any(path.exists() for path in self._made):
            time.sleep(_PAUSE_SECONDS)
        for path in self._made:
            path.unlink(missing_ok=True)
        os.close(alive)
        _remove_if_dead(folder)


def _moved(ranges: Sequence[RemoteRange], address: int) -> list[RemoteRange]:
    """The ranges one after the other, from an address on."""
    moved = []
    for path, offset, length, _ in ranges:
        moved.append(RemoteRange(path, offset, length, address))
        address += length
    return moved


def _address(mapped: mmap.mmap) -> int:
    first = ctypes.c_char.from_buffer(mapped)
    try:
        return ctypes.addressof(first)
    finally:
        del first  # an export would keep the mapping from being closed


def _copy_out(mapped: mmap.mmap, ranges: Sequence[RemoteRange]) -> None:
    begin = _address(mapped)
    for (_, _, length, address), moved in zip(ranges, _moved(ranges, begin), strict=True):
        ctypes.memmove(address, moved.address, length)


def _sweep(below: Path) -> None:
    """Removes what processes that are gone have left."""
    for folder in below.glob(f"{_PREFIX}{os.getuid()}-*"):
        _remove_if_dead(folder)


def _remove_if_dead(folder: Path | None) -> None:
    if folder is None:
        return
    with suppress(OSError):
        handle = os.open(folder / "alive", os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(handle)

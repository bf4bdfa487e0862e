"""Leases and use marks: one server downloads or removes a model at a time, and none removes what another reads.

Both are files that are locked while they count, by `filelock`: between processes of one machine, and between machines
where the file system holds locks for all of them. A lock ends with its process. Where servers share Redis, what they
hold is known there as well (`SharedLocks`), which holds between machines on any file system.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

from filelock import FileLock, Timeout

from mxserver.models.errors import LeaseLost
from mxserver.periodic import Periodic
from mxserver.wire import locks_work, unique_beside

_LOG = logging.getLogger(__name__)

_FILE_MODE = 0o666  # servers of several users share the folder
_LOOK_SECONDS = 0.02  # another one may have a file locked for a moment, to see whether it is


class SharedLocks(Protocol):
    """Locks that servers on several machines share. Each ends by itself unless it is extended. Thread-safe."""

    def acquire(self, name: str, token: str, seconds: float) -> bool:
        """Whether the lock is this token's from now on. False also where nobody can say."""

    def extend(self, name: str, token: str, seconds: float) -> bool | None:
        """Whether the lock is still this token's, for this time from now on; None where nobody can say."""

    def release(self, name: str, token: str) -> None:
        """Idempotent; whatever the lock is."""

    def is_held(self, name: str) -> bool:
        """Whether anybody has the lock. True where nobody can say."""

    def close(self) -> None:
        """Idempotent."""


class _Held:
    """What this process holds under a name, until `let_go`. Made by LeaseFolder."""

    def __init__(self, name: str, lock: FileLock | None) -> None:
        self.name = name
        self.token = uuid.uuid4().hex
        self.extended_at = time.monotonic()
        self.is_lost = False
        self._lock = lock

    def let_go(self) -> None:
        if self._lock is not None:
            with suppress(OSError):  # on a disk that became read-only, the file stays
                self._lock.release()


class Lease:
    """The right to download or remove one model, until `LeaseFolder.release` or until it is lost."""

    def __init__(self, folder: LeaseFolder, key: str, held: _Held) -> None:
        self.key = key
        self._folder = folder
        self._held = held

    @property
    def token(self) -> str:
        """A name that no other holder of this or another lease ever has."""
        return f"{self.key}.{self._held.token}"

    def check(self) -> None:
        """Raises LeaseLost when another server may have taken over."""
        if self._folder.is_lost(self._held):
            raise LeaseLost(f"lease {self.key} was not extended in time, so another server may have it")


class LeaseFolder:
    """The leases and use marks of one cache folder, and those that this process holds. Thread-safe."""

    def __init__(self, folder: Path, lease_seconds: float, shared: SharedLocks | None = None) -> None:
        """With `shared`, a server that is not heard for `lease_seconds` loses what it holds.

        Raises OSError; a read-only disk that has the folders does not, which `is_read_only` tells.
        """
        self._leases = folder / "leases"
        self._uses = folder / "uses"
        for made in (self._leases, self._uses):
            made.mkdir(parents=True, exist_ok=True)
        self._lease_seconds = lease_seconds
        self._locks_work = self.is_read_only = False
        try:
            self._locks_work = locks_work(self._uses)
            self._prefix = f"{_id_of(folder)}:" if shared is not None else ""
        except OSError as error:
            if error.errno != errno.EROFS:
                raise
            self.is_read_only, shared = True, None
        self._shared = shared
        if not self._locks_work and shared is None and not self.is_read_only:
            _LOG.warning(
                "locks of files do not hold in %s: no other server may use it, unless all share Redis "
                "(MX_METADATA_BACKEND=redis)",
                folder,
            )
        self._lock = threading.Lock()
        self._held: dict[Path, _Held] = {}
        self._marks: dict[str, tuple[Path, int]] = {}
        self._keeper = Periodic("leases", lease_seconds / 3, self._extend)
        if shared is not None:
            self._keeper.start()

    def try_acquire(self, key: str) -> Lease | None:
        """The lease, or None while another holder has it."""
        held = self._hold(self._leases / key)
        return None if held is None else Lease(self, key, held)

    @contextmanager
    def acquired(self, key: str, stopping: threading.Event) -> Iterator[Lease]:
        """Waits for a lease that is held for moments only.

        Raises:
            LeaseLost: `stopping` was set meanwhile.
        """
        while (lease := self.try_acquire(key)) is None:
            if stopping.wait(0.02):
                raise LeaseLost(f"the wait for lease {key} has ended: the server is stopping")
        try:
            yield lease
        finally:
            self.release(lease)

    def release(self, lease: Lease) -> None:
        """Idempotent."""
        self._let_go(self._leases / lease.key, lease._held)

    @contextmanager
    def in_use(self, key: str) -> Iterator[None]:
        """Marks a model as being read by this server. Does nothing on a read-only disk, where nobody can remove it."""
        with self._lock:
            path, count = self._marks.get(key, (self._uses / f"{key}.{uuid.uuid4().hex}", 0))
            self._marks[key] = path, count + 1
            try:
                if not count and not self.is_read_only:
                    self._hold_locked(path, must_be_shared=False)
            except OSError as error:
                self._marks.pop(key)
                if error.errno != errno.EROFS:  # the disk became one meanwhile
                    raise
                self._marks[key] = path, count + 1
        try:
            yield
        finally:
            with self._lock:
                path, count = self._marks.pop(key)
                held = self._held.get(path) if count == 1 else None
                if count > 1:
                    self._marks[key] = path, count - 1
            if held is not None:
                self._let_go(path, held)

    def is_used(self, key: str) -> bool:
        """Whether any server reads the model."""
        marks = [path for path in self._uses.iterdir() if path.name.rpartition(".")[0] == key]
        alive = [self._is_held(mark) for mark in marks]
        for mark, lives in zip(marks, alive, strict=True):
            if not lives:
                mark.unlink(missing_ok=True)
        return any(alive)

    def is_leased(self, key: str) -> bool:
        """Whether any server holds the lease."""
        return self._is_held(self._leases / key)

    def busy(self) -> set[str]:
        """The keys that any server reads or has leased, by one look at each folder."""
        found = {path.name for path in self._leases.iterdir() if self._is_held(path)}
        marked = {path.name.rpartition(".")[0] for path in self._uses.iterdir()}
        return found | {key for key in marked - found if key and self.is_used(key)}

    def is_lost(self, held: _Held) -> bool:
        """Whether another server may hold it by now."""
        if self._shared is None:
            return False
        return held.is_lost or time.monotonic() > held.extended_at + self._lease_seconds

    def close(self) -> None:
        """Releases everything. Idempotent."""
        self._keeper.stop()
        with self._lock:
            held = list(self._held.items())
        for path, one in held:
            with suppress(OSError):  # the folder is gone, or on a disk that became read-only
                self._let_go(path, one)
        if self._shared is not None:
            self._shared.close()

    def _hold(self, path: Path) -> _Held | None:
        with self._lock:
            return self._hold_locked(path, must_be_shared=True)

    def _hold_locked(self, path: Path, *, must_be_shared: bool) -> _Held | None:
        """Called with the lock. Raises OSError."""
        if path in self._held:
            return None
        lock = None
        if self._locks_work:
            lock = FileLock(path, timeout=_LOOK_SECONDS, mode=_FILE_MODE, thread_local=False)
            try:
                lock.acquire(poll_interval=_LOOK_SECONDS / 4)
            except Timeout:
                return None
        else:
            path.touch(_FILE_MODE)  # a use mark is found by its name
        held = _Held(path.name, lock)
        name = self._prefix + path.name
        if self._shared is not None and not self._shared.acquire(name, held.token, self._lease_seconds):
            if must_be_shared:
                held.let_go()
                return None
            held.is_lost = True  # not told yet: the keeper does
        self._held[path] = held
        return held

    def _let_go(self, path: Path, held: _Held) -> None:
        with self._lock:
            if self._held.get(path) is not held:
                return
            del self._held[path]
        if self._shared is not None:
            self._shared.release(self._prefix + path.name, held.token)
        held.let_go()
        if path.parent == self._uses or not self._locks_work:
            path.unlink(missing_ok=True)

    def _is_held(self, path: Path) -> bool:
        with self._lock:
            if path in self._held:
                return True
        if self._locks_work and _is_locked(path):
            return True
        return self._shared is not None and self._shared.is_held(self._prefix + path.name)

    def _extend(self) -> None:
        """Has everything that this process holds last longer; a mark that could not be told before is told."""
        assert self._shared is not None  # noqa: S101 - else it is not called
        with self._lock:
            held = list(self._held.items())
        for path, one in held:
            asked_at, name = time.monotonic(), self._prefix + path.name
            is_ours = self._shared.extend(name, one.token, self._lease_seconds)
            if is_ours is False and path.parent == self._uses:
                is_ours = self._shared.acquire(name, one.token, self._lease_seconds) or None
            if is_ours is not None:
                one.is_lost = not is_ours
            if is_ours:
                one.extended_at = asked_at


def _is_locked(path: Path) -> bool:
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False


def _id_of(folder: Path) -> str:
    """What names this folder in Redis, however servers have mounted it; made once. Raises OSError."""
    path = folder / "folder-id"
    with suppress(FileNotFoundError):
        return path.read_text()
    made = unique_beside(path)
    made.write_text(uuid.uuid4().hex)
    try:
        os.link(made, path)  # one of several wins
    except FileExistsError:
        pass
    finally:
        made.unlink()
    return path.read_text()

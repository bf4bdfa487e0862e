"""Leases and use marks in a folder that replicas share: one replica downloads, and none removes what another reads.

Both are files that a living process touches (only the file system's clock is read) and holds a flock on. A file is dead
if it was not touched for the lease's time. It is dead at once if it was made under the same running kernel and nobody
holds the flock. Locks count only within one machine, because some network file systems keep them local, and only where
they hold at all. On a full disk the file stays empty: then its age alone counts, so that models can still be read and
removed. Replicas may run as several users: the file of another one is opened to read alone.

A lease is a chain of files KEY.1, KEY.2 … that only grows: making the next one is exclusive (link(2), which is also
atomic over NFS), the highest one is the lease, its number is the fencing token.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mxserver.models.errors import LeaseLost
from mxserver.models.sources import is_disk_full, write_all
from mxserver.wire import locks_work

_LOG = logging.getLogger(__name__)

_RELEASED = b'{"released": true}'


def kernel_id() -> str:
    """The id of the running kernel, different after every boot and on every machine."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


class _LiveFile:
    """A file that this process keeps alive until `let_go`."""

    def __init__(self, folder: Path, name: str, kernel: str) -> None:
        """Raises FileExistsError if the name is taken."""
        self.path = folder / name
        made = folder / f".{uuid.uuid4().hex}"
        self._handle = os.open(made, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            with suppress(OSError):  # no locks here: the file's age counts
                fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _write(self._handle, json.dumps({"kernel": kernel, "pid": os.getpid()}).encode())
            os.link(made, self.path)
        except BaseException:
            os.close(self._handle)
            raise
        finally:
            made.unlink()
        self._lock = threading.Lock()
        self._held = True

    def touch(self) -> None:
        with self._lock:
            if self._held:
                os.utime(self._handle)

    def let_go(self, *, remove: bool) -> None:
        """Idempotent."""
        with self._lock:
            if not self._held:
                return
            self._held = False
            if remove:
                self.path.unlink(missing_ok=True)
            elif not _write(self._handle, _RELEASED):
                os.utime(self._handle, (0, 0))  # nobody has touched it for long
            os.close(self._handle)


def _write(handle: int, text: bytes) -> bool:
    """Replaces the file's content. On a full disk the file is left empty, and False returned. Raises OSError."""
    os.ftruncate(handle, 0)
    try:
        write_all(handle, text, 0)
    except OSError as error:
        if not is_disk_full(error):
            raise
        os.ftruncate(handle, 0)
        return False
    return True


def _opened(path: Path) -> int:
    """Opened, so that NFS does not answer from its cache; to write where that is permitted, as flock over NFS wants."""
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except PermissionError:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)


class Lease:
    """The right to download or remove one model, until `release` or until it is lost."""

    def __init__(self, file: _LiveFile, folder: Path, key: str, generation: int) -> None:
        self.key = key
        self.generation = generation
        self._file = file
        self._folder = folder

    @property
    def token(self) -> str:
        """A name that no other holder of this or another lease ever has."""
        return f"{self.key}.{self.generation}"

    def check(self) -> None:
        """Raises LeaseLost when another replica has taken over."""
        if (newest := _newest(self._folder, self.key)) != self.generation:
            raise LeaseLost(f"lease {self.key} is at {newest}, this replica had {self.generation}")

    def release(self) -> None:
        """Idempotent."""
        self._file.let_go(remove=False)


def _newest(folder: Path, key: str) -> int:
    numbers = (path.name.rpartition(".") for path in folder.iterdir())
    return max((int(number) for name, _, number in numbers if name == key and number.isdigit()), default=0)


class LeaseFolder:
    """The leases and use marks of one cache folder, and those that this process keeps alive. Thread-safe."""

    def __init__(self, folder: Path, lease_seconds: float, *, kernel: str | None = None) -> None:
        """Tests pass another `kernel` to act as another machine. Raises OSError; a read-only disk that has the folders
        does, which `is_read_only` tells.
        """
        self._leases = folder / "leases"
        self._uses = folder / "uses"
        for made in (self._leases, self._uses):
            made.mkdir(parents=True, exist_ok=True)
        self._lease_seconds = lease_seconds
        self._kernel = kernel or kernel_id()
        self._clock = self._uses / f".clock-{uuid.uuid4().hex}"
        self._locks_work = self.is_read_only = False
        try:
            self._clock.touch()
            self._locks_work = locks_work(self._uses)
        except OSError as error:
            if error.errno != errno.EROFS:
                raise
            self.is_read_only = True
        self._lock = threading.Lock()
        self._held: set[_LiveFile] = set()
        self._marks: dict[str, tuple[_LiveFile, int]] = {}
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._keep_alive, name="leases", daemon=True)
        self._thread.start()

    def try_acquire(self, key: str) -> Lease | None:
        """The lease, or None while another holder has it."""
        newest = _newest(self._leases, key)
        if newest and self._is_alive(self._leases / f"{key}.{newest}"):
            return None
        try:
            file = _LiveFile(self._leases, f"{key}.{newest + 1}", self._kernel)
        except FileExistsError:
            return None
        if _newest(self._leases, key) != newest + 1:
            # Others took later numbers since we looked, and deleted this one: its name was free again.
            file.let_go(remove=True)
            return None
        with self._lock:
            self._held.add(file)
        for older in range(newest, 0, -1):
            try:
                (self._leases / f"{key}.{older}").unlink()
            except FileNotFoundError:
                break
        return Lease(file, self._leases, key, newest + 1)

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
        lease.release()
        self._forget(lease._file)

    @contextmanager
    def in_use(self, key: str) -> Iterator[None]:
        """Marks a model as being read by this replica. Does nothing on a read-only disk, where nobody can remove it."""
        with self._lock:
            file, count = self._marks.get(key, (None, 0))
            if file is None:
                try:
                    file = _LiveFile(self._uses, f"{key}.{uuid.uuid4().hex}", self._kernel)
                except OSError as error:
                    if error.errno != errno.EROFS:
                        raise
                else:
                    self._held.add(file)
            if file is not None:
                self._marks[key] = (file, count + 1)
        if file is None:
            yield
            return
        try:
            yield
        finally:
            with self._lock:
                file, count = self._marks.pop(key)
                if count > 1:
                    self._marks[key] = (file, count - 1)
                else:
                    self._held.discard(file)
                    file.let_go(remove=True)

    def is_used(self, key: str) -> bool:
        """Whether any replica reads the model."""
        marks = [path for path in self._uses.iterdir() if path.name.rpartition(".")[0] == key]
        alive = [self._is_alive(mark) for mark in marks]
        for mark, lives in zip(marks, alive, strict=True):
            if not lives:
                mark.unlink(missing_ok=True)
        return any(alive)

    def is_leased(self, key: str) -> bool:
        """Whether any replica holds the lease."""
        newest = _newest(self._leases, key)
        return newest > 0 and self._is_alive(self._leases / f"{key}.{newest}")

    def busy(self) -> set[str]:
        """The keys that any replica reads or has leased, by one look at each folder."""
        newest: dict[str, int] = {}
        for path in self._leases.iterdir():
            key, _, number = path.name.rpartition(".")
            if number.isdigit():
                newest[key] = max(newest.get(key, 0), int(number))
        found = {key for key, number in newest.items() if self._is_alive(self._leases / f"{key}.{number}")}
        marked = {path.name.rpartition(".")[0] for path in self._uses.iterdir()}
        return found | {key for key in marked - found if key and self.is_used(key)}

    def close(self) -> None:
        """Releases everything. Idempotent."""
        self._stopping.set()
        self._thread.join()
        with self._lock:
            held, self._held = self._held, set()
            marks, self._marks = [file for file, _ in self._marks.values()], {}
        for file in marks:
            file.let_go(remove=True)
        for file in held:
            file.let_go(remove=False)
        with suppress(OSError):  # gone, or on a disk that became read-only
            self._clock.unlink(missing_ok=True)

    def _forget(self, file: _LiveFile) -> None:
        with self._lock:
            self._held.discard(file)

    def _is_alive(self, path: Path) -> bool:
        try:
            handle = _opened(path)
        except FileNotFoundError:
            return False
        try:
            return self._owner_lives(handle)
        finally:
            os.close(handle)

    def _owner_lives(self, handle: int) -> bool:
        text = os.pread(handle, 4096, 0)
        if text == _RELEASED:
            return False
        if self._locks_work and f'"{self._kernel}"'.encode() in text:
            try:
                fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                pass
            else:
                return False
        return self._now() - os.fstat(handle).st_mtime <= self._lease_seconds

    def _now(self) -> float:
        """The file system's time: the time stamp of a file that is touched now."""
        os.utime(self._clock)
        return self._clock.stat().st_mtime

    def _keep_alive(self) -> None:
        while not self._stopping.wait(self._lease_seconds / 3):
            with self._lock:
                held = list(self._held)
            for file in held:
                try:
                    file.touch()
                except OSError as error:
                    _LOG.warning("cannot keep alive file=%s reason=%s", file.path.name, error)

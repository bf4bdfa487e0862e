"""The last loads of each model, in memory, and in a file of their own that a restart reads again.

The file is SQLite, beside the store's, and written by a thread of its own: no call waits for it, and what the disk does
not take is left out there (tests/web/test_load_history.py). It holds no more than the memory does.
"""

from __future__ import annotations

import contextlib
import logging
import math
import queue
import sqlite3
import threading
from collections import OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from google.protobuf.message import DecodeError

from mxserver.store import RecordKey
from mxserver.telemetry.events import bounded
from mxserver.telemetry.metrics import path_label
from mxserver.wire.proto import load_pb2

_LOG = logging.getLogger(__name__)

KEPT_LOADS = 10_000
KEPT_OF_A_MODEL = 4_000
KEPT_BYTES = 8 * 1024 * 1024
LONGEST_NAME = 200
MAX_FALLBACKS = 8  # of one load
MAX_GIVERS = 8
LONGEST_SECONDS = 30 * 86400.0

_APPLICATION_ID = 0x4D584C48  # "MXLH"
_SCHEMA_VERSION = 1
_SCHEMA = f"""
BEGIN IMMEDIATE;
CREATE TABLE load (id INTEGER PRIMARY KEY, kept BLOB NOT NULL);
PRAGMA application_id = {_APPLICATION_ID};
PRAGMA user_version = {_SCHEMA_VERSION};
COMMIT;
"""
_WAITING_CHANGES = 20_000
_CHANGES_PER_COMMIT = 1_000
_LOCK_WAIT_SECONDS = 2.0
_CLOSE_SECONDS = 2.0
_WAL_KEEP_BYTES = 1024 * 1024


@dataclass(frozen=True, slots=True)
class FinishedLoad:
    """A load that has ended; `at_ms` is Unix time of its report.

    `seconds` are those of the step that loaded; `wait_seconds`, `transfer_seconds` and `process_seconds` are the whole
    from the worker's joining to the report, all 0 where the worker does not tell. `given`: bytes by worker id, of those
    that gave most; `givers` counts all of them. `replica` is never empty: a worker that names none is one by itself.
    """

    key: RecordKey
    model_name: str
    at_ms: int
    path: str
    bytes: int
    seconds: float
    from_worker_id: str
    chunks_verified: int
    fallbacks: tuple[str, ...]
    wait_seconds: float = 0.0
    transfer_seconds: float = 0.0
    process_seconds: float = 0.0
    given: tuple[tuple[str, int], ...] = ()
    givers: int = 0
    bytes_from_workers: int = 0
    pod_name: str = ""
    node_name: str = ""
    replica: str = ""

    @property
    def ready_seconds(self) -> float:
        """From joining to the report; of a worker that does not tell, those of the step that loaded."""
        return self.wait_seconds + self.transfer_seconds + self.process_seconds or self.seconds

    @property
    def began_ms(self) -> float:
        """Unix time."""
        return self.at_ms - 1000 * self.ready_seconds


class LoadHistory:
    """What has ended, by model. Thread-safe; `close` it. Without a path, or with a file that fails, in memory alone."""

    def __init__(self, path: Path | None = None) -> None:
        """Reads what the file has."""
        self._lock = threading.Lock()
        self._of: OrderedDict[str, deque[_Entry]] = OrderedDict()  # model in lower case → loads, oldest first
        self._revisions: dict[str, int] = {}
        self._count = self._bytes = 0
        self._last_id = 0
        self._last_revision = 0
        self._file: _LoadFile | None = None
        if path is None:
            return
        try:
            self._file = _LoadFile(path)
        except (sqlite3.Error, OSError, _NotOurs) as error:
            _LOG.warning("%s cannot be used (%s): the last loads are kept in memory alone", path, error)
            return
        gone: list[int] = []
        for number, kept in self._file.read:
            self._last_id = max(self._last_id, number)
            try:
                gone += self._keep(number, len(kept), finished(load_pb2.KeptLoad.FromString(kept)))
            except DecodeError:
                gone.append(number)
        self._file.start()
        self._file.put([(number, None) for number in gone])

    def add(self, kept: load_pb2.KeptLoad) -> FinishedLoad:
        """Keeps a load that has ended, its texts cut to their limits; returns it as it is shown. Does not wait."""
        cut(kept)
        load = finished(kept)
        data = kept.SerializeToString() if self._file is not None else b""
        with self._lock:
            self._last_id += 1
            number = self._last_id
            gone = self._keep(number, len(data) or kept.ByteSize(), load)
            if self._file is not None:
                self._file.put([(number, data), *((one, None) for one in gone)])
        return load

    def models(self) -> dict[str, int]:
        """The names of models in lower case, with a number that changes whenever a load of it is added or dropped."""
        with self._lock:
            return {name: self._revisions[name] for name in self._of}

    def of(self, model_name: str) -> list[FinishedLoad]:
        """The last loads of a model, newest first."""
        with self._lock:
            return [entry.load for entry in reversed(self._of.get(model_name.lower(), ()))]

    def newest(self, most: int) -> list[FinishedLoad]:
        """The last loads of all models, newest first."""
        with self._lock:
            entries = [entry for of in self._of.values() for _, entry in zip(range(most), reversed(of), strict=False)]
        return [entry.load for entry in sorted(entries, key=lambda entry: -entry.number)[:most]]

    def close(self) -> None:
        """Writes what waits, unless the disk is stuck. Idempotent."""
        if self._file is not None:
            self._file.close()

    def _keep(self, number: int, size: int, load: FinishedLoad) -> list[int]:
        """Adds it; returns the numbers of those that had to go. With the lock, or before anybody else has this."""
        name = load.model_name.lower()
        of = self._of.setdefault(name, deque())
        of.append(_Entry(number, size, load))
        self._count, self._bytes = self._count + 1, self._bytes + size
        self._revise(name)
        gone = []
        if len(of) > KEPT_OF_A_MODEL:
            gone.append(self._drop(name))
        while self._count > KEPT_LOADS or self._bytes > KEPT_BYTES:
            gone.append(self._drop(max(self._of, key=lambda one: len(self._of[one]))))  # it keeps most without it
        return gone

    def _drop(self, name: str) -> int:
        of = self._of[name]
        entry = of.popleft()
        self._count, self._bytes = self._count - 1, self._bytes - entry.size
        self._revise(name)
        if not of:
            del self._of[name], self._revisions[name]
        return entry.number

    def _revise(self, name: str) -> None:
        self._last_revision += 1
        self._revisions[name] = self._last_revision


class _Entry(NamedTuple):
    number: int
    size: int
    load: FinishedLoad


class _NotOurs(Exception):
    """The file is another program's, or a newer version's."""


class _LoadFile:
    """The file, and the thread that writes it."""

    def __init__(self, path: Path) -> None:
        """Opens or makes it, and reads it. Raises sqlite3.Error, OSError, _NotOurs."""
        self._path = path
        self._changes: queue.Queue[tuple[int, bytes | None] | None] = queue.Queue(_WAITING_CHANGES)
        self._failing = False
        self._closed = False
        path.parent.mkdir(parents=True, exist_ok=True)
        self._connection = sqlite3.connect(
            path, timeout=_LOCK_WAIT_SECONDS, isolation_level=None, check_same_thread=False
        )
        try:
            self.read: list[tuple[int, bytes]] = list(self._prepared())
        except BaseException:
            self._connection.close()
            raise
        self._thread = threading.Thread(target=self._write, name="load-history", daemon=True)

    def _prepared(self) -> Iterator[tuple[int, bytes]]:
        run = self._connection.execute
        run("PRAGMA locking_mode = EXCLUSIVE")
        application, version = (run(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version"))
        tables = run("SELECT count(*) FROM sqlite_schema").fetchone()[0]
        if tables and (application, version) != (_APPLICATION_ID, _SCHEMA_VERSION):
            raise _NotOurs("it is another program's, or a newer mxserver's")
        run("PRAGMA journal_mode = WAL")
        run("PRAGMA synchronous = NORMAL")  # a power loss may cost the last loads, and nothing else
        run(f"PRAGMA journal_size_limit = {_WAL_KEEP_BYTES}")
        if not tables:
            self._connection.executescript(_SCHEMA)
        for number, kept in run("SELECT id, kept FROM load ORDER BY id"):
            yield number, bytes(kept)

    def start(self) -> None:
        self._thread.start()
        self.read = []

    def put(self, changes: list[tuple[int, bytes | None]]) -> None:
        """Loads to write by number, None: to delete. What does not fit the queue is left out of the file."""
        for change in changes:
            try:
                self._changes.put_nowait(change)
            except queue.Full:
                self._note("the disk is too slow for it")
                return

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        with contextlib.suppress(queue.Full):
            self._changes.put(None, timeout=_CLOSE_SECONDS)
        if self._thread.ident is not None:
            self._thread.join(_CLOSE_SECONDS)
        else:
            self._connection.close()

    def _write(self) -> None:
        run = self._connection.execute
        while True:
            changes = self._taken()
            try:
                run("BEGIN IMMEDIATE")
                for change in changes:
                    if change is None:
                        continue
                    if change[1] is None:
                        run("DELETE FROM load WHERE id = ?", change[:1])
                    else:
                        run("INSERT OR REPLACE INTO load VALUES (?, ?)", change)
                run("COMMIT")
                self._failing = False
            except Exception as error:  # noqa: BLE001 - the thread must outlive it; memory has the loads
                with contextlib.suppress(sqlite3.Error):
                    self._connection.rollback()
                self._note(str(error))
            if None in changes:
                self._connection.close()
                return

    def _taken(self) -> list[tuple[int, bytes | None] | None]:
        """Waits for a change, and takes those that wait by then too."""
        taken = [self._changes.get()]
        with contextlib.suppress(queue.Empty):
            while len(taken) < _CHANGES_PER_COMMIT and taken[-1] is not None:
                taken.append(self._changes.get_nowait())
        return taken

    def _note(self, reason: str) -> None:
        if not self._failing:
            _LOG.warning("%s does not get the last loads (%s); they are in memory", self._path, reason)
        self._failing = True


def cut(kept: load_pb2.KeptLoad) -> None:
    """Cuts what a client sent to its limits."""
    kept.model_name = bounded(kept.model_name, LONGEST_NAME)
    for name in ("mx_source_id", "worker_id", "pod_name", "node_name", "replica"):
        setattr(kept, name, bounded(getattr(kept, name), LONGEST_NAME))
    report = kept.report
    report.load_id = ""
    report.from_worker_id = bounded(report.from_worker_id, LONGEST_NAME)
    del report.fallbacks[MAX_FALLBACKS:]
    for fallback in report.fallbacks:
        fallback.reason = bounded(fallback.reason, LONGEST_NAME)
    report.givers = max(report.givers, len(report.given))
    del report.given[MAX_GIVERS:]
    for given in report.given:
        given.worker_id = bounded(given.worker_id, LONGEST_NAME)
    for name in ("seconds", "wait_seconds", "transfer_seconds", "process_seconds"):
        value = getattr(report, name)
        setattr(report, name, min(value, LONGEST_SECONDS) if math.isfinite(value) and value > 0 else 0.0)


def finished(kept: load_pb2.KeptLoad) -> FinishedLoad:
    """A load that was cut to its limits, as it is shown."""
    report = kept.report
    path = path_label(report.path)
    told = report.bytes_from_workers if report.HasField("bytes_from_workers") else None
    of_workers = (report.bytes if path.startswith("peer_") else 0) if told is None else told
    return FinishedLoad(
        key=RecordKey(kept.mx_source_id, kept.worker_id, kept.worker_rank),
        model_name=kept.model_name,
        at_ms=kept.at_unix_ms,
        path=path,
        bytes=report.bytes,
        seconds=report.seconds,
        from_worker_id=report.from_worker_id,
        chunks_verified=report.chunks_verified,
        fallbacks=tuple(f"{path_label(f.path)}: {f.reason}" for f in report.fallbacks),
        wait_seconds=report.wait_seconds,
        transfer_seconds=report.transfer_seconds,
        process_seconds=report.process_seconds,
        given=tuple((given.worker_id, given.bytes) for given in report.given),
        givers=report.givers,
        bytes_from_workers=min(of_workers, report.bytes),
        pod_name=kept.pod_name,
        node_name=kept.node_name,
        replica=kept.replica or kept.worker_id,
    )

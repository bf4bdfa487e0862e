"""The SQLite file: its schema, its checks, and what one commit writes.

One connection, used by one thread, with the file locked for this process alone: SQLite up to 3.51.2 can corrupt a WAL
database with several connections, and two servers on one file would overwrite each other's records.
"""

from __future__ import annotations

import errno
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from google.protobuf.message import DecodeError

from mxserver.store.batch import Batch
from mxserver.store.errors import StoreTooNew, StoreUnavailable, StoreUnusable
from mxserver.store.interface import RecordKey, SourceRecord
from mxserver.store.stored_amount import without_large_parts
from mxserver.wire.proto import p2p_pb2, record_pb2

APPLICATION_ID = 0x4D585352  # "MXSR"
SCHEMA_VERSION = 2

_WAL_KEEP_BYTES = 64 * 1024 * 1024
_LOCK_WAIT_SECONDS = 2.0
_WRITTEN_IN_PARTS_BYTES = 1024 * 1024

# The status is apart from the payload so that a transition does not rewrite megabytes of metadata.
_SCHEMA = f"""
BEGIN IMMEDIATE;
CREATE TABLE counter (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE source (
    id INTEGER PRIMARY KEY,
    source_id TEXT NOT NULL,
    worker_id TEXT NOT NULL,
    worker_rank INTEGER NOT NULL,
    epoch INTEGER NOT NULL,
    life INTEGER NOT NULL,
    owner TEXT NOT NULL,
    status INTEGER NOT NULL,
    updated_at_ms INTEGER NOT NULL,
    UNIQUE (source_id, worker_id, worker_rank)
);
CREATE TABLE payload (
    source INTEGER PRIMARY KEY REFERENCES source (id) ON DELETE CASCADE,
    identity BLOB NOT NULL,
    worker BLOB NOT NULL
);
PRAGMA application_id = {APPLICATION_ID};
PRAGMA user_version = {SCHEMA_VERSION};
COMMIT;
"""

# Version 1 had neither lives nor owners: each record's life began with its last publish.
_FROM_VERSION_1 = """
BEGIN IMMEDIATE;
ALTER TABLE source ADD COLUMN life INTEGER NOT NULL DEFAULT 0;
ALTER TABLE source ADD COLUMN owner TEXT NOT NULL DEFAULT '';
UPDATE source SET life = epoch;
PRAGMA user_version = 2;
COMMIT;
"""

_KEY = "source_id = ? AND worker_id = ? AND worker_rank = ?"
_PUT_SOURCE = """
INSERT INTO source (source_id, worker_id, worker_rank, epoch, life, owner, status, updated_at_ms)
VALUES (?, ?, ?, ?, ?, ?, ?, ?)
ON CONFLICT DO UPDATE SET epoch = excluded.epoch, life = excluded.life, owner = excluded.owner,
    status = excluded.status, updated_at_ms = excluded.updated_at_ms
"""
_PUT_PAYLOAD = f"INSERT OR REPLACE INTO payload SELECT id, ?, ? FROM source WHERE {_KEY}"  # noqa: S608
_PUT_EMPTY_PAYLOAD = f"INSERT OR REPLACE INTO payload SELECT id, ?, zeroblob(?) FROM source WHERE {_KEY}"  # noqa: S608
_ROW = f"SELECT id FROM source WHERE {_KEY}"  # noqa: S608
_DELETE = f"DELETE FROM source WHERE {_KEY}"  # noqa: S608
_PUT_EPOCH = "INSERT OR REPLACE INTO counter VALUES ('epoch', ?)"
_READ_WORKER = f"SELECT worker FROM source JOIN payload ON payload.source = source.id WHERE {_KEY} AND epoch = ?"  # noqa: S608
_READ = """
SELECT source_id, worker_id, worker_rank, status, epoch, life, owner, updated_at_ms, identity, worker
FROM source JOIN payload ON payload.source = source.id ORDER BY epoch
"""


class SqliteFile:
    """An open store file. Everything, construction included, happens in one thread."""

    def __init__(self, path: Path) -> None:
        """Opens the file, or makes it. Raises StoreUnusable."""
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _require_writable(path)
            self._connection = sqlite3.connect(path, timeout=_LOCK_WAIT_SECONDS, isolation_level=None)
        except (OSError, sqlite3.Error) as error:
            raise unusable(path, error) from error
        try:
            self._prepare()
            status = path.stat()
        except (OSError, sqlite3.Error) as error:
            self._connection.close()
            raise unusable(path, error) from error
        except StoreUnusable:
            self._connection.close()
            raise
        self._identity = status.st_dev, status.st_ino

    def _prepare(self) -> None:
        run = self._connection.execute
        run("PRAGMA locking_mode = EXCLUSIVE")  # before WAL, so that no shared memory file is needed
        run("PRAGMA foreign_keys = ON")
        application, version = (run(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version"))
        tables = run("SELECT count(*) FROM sqlite_schema").fetchone()[0]
        if tables and application != APPLICATION_ID:
            raise StoreUnusable(f"{self.path} is the database of another program; give another --store-path")
        if version > SCHEMA_VERSION:
            raise StoreTooNew(
                f"{self.path} has schema {version}, written by a newer mxserver; this one knows schemas up to "
                f"{SCHEMA_VERSION}: run the newer version, or give another --store-path"
            )
        run("PRAGMA journal_mode = WAL")
        run("PRAGMA synchronous = FULL")
        run(f"PRAGMA journal_size_limit = {_WAL_KEEP_BYTES}")
        if not tables:
            self._connection.executescript(_SCHEMA)
        elif version == 1:
            self._connection.executescript(_FROM_VERSION_1)
        problems = [row[0] for row in run("PRAGMA quick_check(3)")]
        if problems != ["ok"]:
            raise StoreUnusable(_damaged(self.path, "; ".join(problems)))

    def last_epoch(self) -> int:
        """The last epoch that was handed out; 0 in a new file."""
        row = self._connection.execute("SELECT value FROM counter WHERE name = 'epoch'").fetchone()
        return int(row[0]) if row else 0

    def records(self) -> Iterator[SourceRecord]:
        """All records as they were last written, without their large parts."""
        for (
            source_id,
            worker_id,
            worker_rank,
            status,
            epoch,
            life,
            owner,
            updated_at_ms,
            identity,
            worker,
        ) in self._connection.execute(_READ):
            metadata = record_pb2.WorkerFacts.FromString(worker)
            record = SourceRecord(
                key=RecordKey(source_id, worker_id, worker_rank),
                status=status,
                epoch=epoch,
                life=life,
                owner=owner,
                updated_at_ms=updated_at_ms,
                identity=identity,
                worker=worker,
                model_name=p2p_pb2.SourceIdentity.FromString(identity).model_name,
                accelerator=metadata.accelerator,
                topology=dict(metadata.topology),
                endpoint=metadata.worker_grpc_endpoint,
                payload_bytes=len(identity) + len(worker),
            )
            yield without_large_parts(record)

    def worker(self, key: RecordKey, epoch: int) -> bytes | None:
        """The whole metadata that was published with this epoch; None if there is another by now.

        Raises:
            StoreUnavailable: it cannot be read.
        """
        try:
            row = self._connection.execute(_READ_WORKER, (*key, epoch)).fetchone()
        except sqlite3.Error as error:
            raise StoreUnavailable(f"reading from {self.path} failed: {error}") from error
        return None if row is None else bytes(row[0])

    def commit(self, batch: Batch, last_epoch: int) -> None:
        """Writes the batch's changes and the last epoch, all or nothing, and waits until the disk has them.

        Raises:
            StoreUnavailable: nothing was written.
        """
        self.require_in_place()
        run = self._connection.execute
        try:
            run("BEGIN IMMEDIATE")
            run(_PUT_EPOCH, (last_epoch,))
            for key, record in batch.changes.items():
                if record is None:
                    run(_DELETE, key)
                    continue
                run(_PUT_SOURCE, (*key, record.epoch, record.life, record.owner, record.status, record.updated_at_ms))
                if key in batch.published:
                    self._put_payload(key, record)
            run("COMMIT")
        except Exception as error:  # of the values too (OverflowError): the writer thread must outlive it
            if self._connection.in_transaction:  # after some errors SQLite has rolled back by itself
                self._connection.rollback()
            raise StoreUnavailable(f"writing to {self.path} failed: {error}") from error

    def _put_payload(self, key: RecordKey, record: SourceRecord) -> None:
        """SQLite takes three times the memory of a value that it is given whole, so a large one is written in parts."""
        run = self._connection.execute
        if len(record.worker) < _WRITTEN_IN_PARTS_BYTES:
            run(_PUT_PAYLOAD, (record.identity, record.worker, *key))
            return
        run(_PUT_EMPTY_PAYLOAD, (record.identity, len(record.worker), *key))
        ((row,),) = run(_ROW, key)
        with self._connection.blobopen("payload", "worker", row) as blob, memoryview(record.worker) as worker:
            for at in range(0, len(worker), _WRITTEN_IN_PARTS_BYTES):
                blob.write(worker[at : at + _WRITTEN_IN_PARTS_BYTES])

    def try_transaction(self) -> None:
        """Begins a transaction and ends it: nothing is written. Raises StoreUnavailable."""
        self.require_in_place()
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            self._connection.execute("COMMIT")
        except sqlite3.Error as error:
            if self._connection.in_transaction:
                self._connection.rollback()
            raise StoreUnavailable(f"{self.path} cannot be written to: {error}") from error

    def require_in_place(self) -> None:
        """Raises StoreUnavailable when the path names another file now: further writes would be lost."""
        try:
            status = os.stat(self.path)  # noqa: PTH116 - a path object costs more than the call
        except OSError as error:
            raise StoreUnavailable(f"{self.path} is gone ({error.strerror}); restart mxserver") from error
        if (status.st_dev, status.st_ino) != self._identity:
            raise StoreUnavailable(f"{self.path} was replaced by another file; restart mxserver")

    def close(self) -> None:
        self._connection.close()


def _require_writable(path: Path) -> None:
    """Raises PermissionError, where SQLite would say "disk I/O error". The folder will hold the write-ahead log."""
    for place in (path, path.parent):
        if place.exists() and not os.access(place, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(place))


def _damaged(path: Path, reason: str) -> str:
    return f"{path} is damaged ({reason}); move it away to start empty, or give another --store-path"


def unusable(path: Path, error: OSError | sqlite3.Error | DecodeError) -> StoreUnusable:
    """The error of opening or reading the file, as one line that says what to do."""
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # without the extended part
    if isinstance(error, DecodeError) or code in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT):
        return StoreUnusable(_damaged(path, str(error)))
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return StoreUnusable(f"{path} is in use by another process; stop that one, or give another --store-path")
    reason = getattr(error, "strerror", None) or str(error)
    return StoreUnusable(
        f"{path} cannot be opened for writing ({reason}); make it writable, give another --store-path, or keep the "
        "state in memory with --store memory"
    )

"""The default store: records in memory for reading, kept in one SQLite file. Large metadata is in the file alone.

Changes of callers that wait at the same moment are written by one commit; each caller gets its answer after that
commit. Repeated heartbeats stay in memory.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import queue
import sqlite3
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from google.protobuf.message import DecodeError

from mxserver.limits import DEFAULT, ServerLimits
from mxserver.store.batch import Batch, EpochCounter, take_waiting
from mxserver.store.clock import Clock, SystemClock
from mxserver.store.errors import StoreEnded, StoreUnavailable, StoreUnusable
from mxserver.store.index import RecordIndex
from mxserver.store.interface import Leases, Publication, Query, RecordKey, SourceRecord, SourceStore, Status
from mxserver.store.sqlite_file import SqliteFile, unusable
from mxserver.store.stored_amount import without_large_parts
from mxserver.store.turns import MemoryTurns

_LOG = logging.getLogger(__name__)

T = TypeVar("T")

MAX_CHANGES_PER_COMMIT = 256
ANSWER_SECONDS = 20.0  # below the 30 s that clients wait, so that they get the reason
CHECK_SECONDS = 1.0  # how long a check waits for the writer; it may be later, as long as callers wait


class _Change(NamedTuple):
    decide: Callable[[Batch], Any]
    answer: Future[Any]
    only_reads: bool = False


def _nothing(_: Batch) -> None:
    """The change of a check."""


class SqliteStore(SourceStore):
    """Records in one SQLite file, which this process locks.

    When the file stops working (disk full, I/O error, removed), changes raise StoreUnavailable. Earlier records can
    still be read, and changes work again as soon as the file does.
    """

    def __init__(
        self,
        path: Path,
        leases: Leases | None = None,
        clock: Clock | None = None,
        limits: ServerLimits = DEFAULT,
    ) -> None:
        """Opens or makes the file. Raises StoreUnusable."""
        self._limits = limits
        self._clock = clock or SystemClock()
        self.turns = MemoryTurns(self._clock)
        self._index = RecordIndex(leases or Leases(), self._clock)
        self._changes: queue.SimpleQueue[_Change | None] = queue.SimpleQueue()
        self._submitting = threading.Lock()
        self._closed = False
        self._failure: StoreUnavailable | None = None  # of the last commit
        self._ended: StoreEnded | None = None  # why the writer ended, where it did by an error
        self._check: Future[None] | None = None  # the last check that was put into the queue, and when
        self._check_at = 0.0
        self._writing_since: float | None = None  # monotonic seconds, while changes are decided and written
        opened: Future[SqliteFile] = Future()
        self._writer = threading.Thread(target=self._write, args=(path, opened), name="sqlite-writer", daemon=True)
        self._writer.start()
        try:
            self._file = opened.result()
        except StoreUnusable:
            self._closed = True
            self._writer.join()
            raise

    def publish(self, publication: Publication) -> SourceRecord:
        return self._change(lambda batch: batch.publish(publication))

    def update_status(
        self, key: RecordKey, status: Status, *, epoch: int = 0, source_load: float | None = None, owner: str = ""
    ) -> None:
        self._require_open()
        if not self._index.renew(key, status, epoch, source_load, owner):
            self._change(lambda batch: batch.update_status(key, status, epoch, source_load, owner))

    def get(self, source_id: str, worker_id: str) -> SourceRecord | None:
        self._require_open()
        return self._index.get_lowest(source_id, worker_id)

    def whole_worker(self, record: SourceRecord) -> bytes | None:
        if not record.worker_is_cut:
            return record.worker
        # Large metadata is in the file alone, and only one thread touches that.
        return self._change(functools.partial(self._read_worker, record.key, record.epoch), only_reads=True)

    def _read_worker(self, key: RecordKey, epoch: int, _: Batch) -> bytes | None:
        return self._file.worker(key, epoch)

    def find(self, query: Query) -> list[SourceRecord]:
        self._require_open()
        return self._index.find(query)

    def sweep(self) -> tuple[int, int]:
        self._require_open()
        return self._change(Batch.sweep) if any(self._index.due()) else (0, 0)

    def waits_for_disk(self, key: RecordKey, status: Status) -> bool:
        record = self._index.get(key)
        return record is not None and record.status != status

    def check(self) -> None:
        """Puts an empty transaction through the writer's queue; after a failure one that the disk has to keep."""
        self._require_open()
        self._require_writer()
        self._file.require_in_place()
        with self._submitting:
            self._require_open()
            if self._check is None or self._check.done():
                self._check, self._check_at = Future(), time.monotonic()
                self._changes.put(_Change(_nothing, self._check))
            check, since = self._check, self._check_at
        try:
            check.result(timeout=CHECK_SECONDS)
        except TimeoutError:
            if time.monotonic() - since > ANSWER_SECONDS:
                raise StoreUnavailable(f"the disk has not answered for more than {ANSWER_SECONDS:g} s") from None

    def close(self) -> None:
        with self._submitting:
            if not self._closed:
                self._closed = True
                self._changes.put(None)
        self._writer.join()

    def _require_open(self) -> None:
        if self._closed:
            raise StoreUnavailable("the store is closed: the server is shutting down")
        if self._ended is not None:
            raise self._ended

    def _change(self, decide: Callable[[Batch], T], *, only_reads: bool = False) -> T:
        answer: Future[T] = Future()
        with self._submitting:
            self._require_open()
            self._changes.put(_Change(decide, answer, only_reads))
        try:
            return answer.result(timeout=ANSWER_SECONDS)
        except TimeoutError:
            kept = "nothing of it is kept" if answer.cancel() else "whether it is kept will show: ask again"
            raise StoreUnavailable(f"the disk did not answer within {ANSWER_SECONDS:g} s; {kept}") from None

    def _write(self, path: Path, opened: Future[SqliteFile]) -> None:
        """The writer thread: the only one that touches the file."""
        try:
            with contextlib.closing(SqliteFile(path)) as file:
                try:
                    # A new file begins at the time in ms, so epochs grow even if an earlier file was deleted.
                    epochs = EpochCounter(file.last_epoch() or self._clock.unix_ms())
                    self._index.load(file.records())
                except (sqlite3.Error, DecodeError) as error:
                    raise unusable(path, error) from error
                opened.set_result(file)
                self._write_changes(file, epochs)
        except StoreUnusable as error:
            opened.set_exception(error)  # raised by the constructor
        except BaseException as error:  # noqa: BLE001 - nobody expected it: memory and file may differ
            _LOG.exception("the thread that writes has ended")
            self._end(StoreEnded(f"the thread that writes has ended ({error!r}); restart mxserver"))

    def _write_changes(self, file: SqliteFile, epochs: EpochCounter) -> None:
        while changes := self._next_changes():
            self._writing_since = time.monotonic()
            running = [each for each in changes if each.answer.set_running_or_notify_cancel()]
            try:
                self._keep(file, epochs, running)
            except BaseException as error:
                for change in running:
                    if not change.answer.done():
                        change.answer.set_exception(StoreUnavailable(f"writing failed: {error!r}"))
                raise
            self._writing_since = None

    def _end(self, reason: StoreEnded) -> None:
        """Fails those who wait, and everybody from now on."""
        with self._submitting:
            self._ended = reason
        for change in iter(self._waiting_change, None):
            if change.answer.set_running_or_notify_cancel():
                change.answer.set_exception(reason)

    def _waiting_change(self) -> _Change | None:
        with contextlib.suppress(queue.Empty):
            return self._changes.get_nowait()
        return None

    def _next_changes(self) -> list[_Change]:
        """Waits for a change, and takes the others that wait by then too; an empty list once the store closes."""
        first = self._changes.get()
        return [] if first is None else take_waiting(self._changes, first, MAX_CHANGES_PER_COMMIT)

    def _keep(self, file: SqliteFile, epochs: EpochCounter, changes: list[_Change]) -> None:
        batch = Batch(self._index, epochs, self._clock, self._limits)
        decided: list[tuple[Future[Any], Any]] = []
        for change in changes:
            try:
                if change.only_reads:
                    change.answer.set_result(change.decide(batch))
                else:
                    decided.append((change.answer, change.decide(batch)))
            except BaseException as error:  # noqa: BLE001 - raised in the thread of who asked
                change.answer.set_exception(error)
        if not decided:
            return
        try:
            if self._failure is None and all(change.decide is _nothing for change in changes if not change.only_reads):
                file.try_transaction()
            else:
                file.commit(batch, epochs.last)
        except Exception as error:  # noqa: BLE001 - told to all who wait and to `check`; the writer goes on
            self._failure = StoreUnavailable(*error.args)
            for answer, _ in decided:
                answer.set_exception(StoreUnavailable(*error.args))
            return
        self._failure = None
        self._index.apply({key: record and without_large_parts(record) for key, record in batch.changes.items()})
        for answer, outcome in decided:
            answer.set_result(outcome)

    def _require_writer(self) -> None:
        """Raises StoreUnavailable where the writer ended, or has been silent for longer than callers wait."""
        since = self._writing_since
        if not self._writer.is_alive():
            raise StoreEnded("the thread that writes has ended; restart mxserver")
        if since is not None and time.monotonic() - since > ANSWER_SECONDS:
            raise StoreUnavailable(f"the disk has not answered for more than {ANSWER_SECONDS:g} s")

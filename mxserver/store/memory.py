"""A store that forgets everything when the server ends: `--store memory`."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

from mxserver.limits import DEFAULT, ServerLimits
from mxserver.store.batch import Batch, EpochCounter
from mxserver.store.clock import Clock, SystemClock
from mxserver.store.errors import StoreUnavailable
from mxserver.store.index import RecordIndex
from mxserver.store.interface import Leases, Publication, Query, RecordKey, SourceRecord, SourceStore, Status
from mxserver.store.turns import MemoryTurns

T = TypeVar("T")


class MemoryStore(SourceStore):
    """Records in this process alone. Epochs begin at the time in ms, so that they also grow across restarts."""

    def __init__(
        self, leases: Leases | None = None, clock: Clock | None = None, limits: ServerLimits = DEFAULT
    ) -> None:
        self._limits = limits
        self._clock = clock or SystemClock()
        self.turns = MemoryTurns(self._clock)
        self._index = RecordIndex(leases or Leases(), self._clock)
        self._epochs = EpochCounter(self._clock.unix_ms())
        self._changing = threading.Lock()
        self._closed = False

    def publish(self, publication: Publication) -> SourceRecord:
        return self._change(lambda batch: batch.publish(publication))

    def update_status(
        self, key: RecordKey, status: Status, *, epoch: int = 0, source_load: float | None = None, owner: str = ""
    ) -> None:
        self.check()
        if not self._index.renew(key, status, epoch, source_load, owner):
            self._change(lambda batch: batch.update_status(key, status, epoch, source_load, owner))

    def get(self, source_id: str, worker_id: str) -> SourceRecord | None:
        self.check()
        return self._index.get_lowest(source_id, worker_id)

    def whole_worker(self, record: SourceRecord) -> bytes | None:
        return record.worker

    def find(self, query: Query) -> list[SourceRecord]:
        self.check()
        return self._index.find(query)

    def sweep(self) -> tuple[int, int]:
        return self._change(Batch.sweep)

    def check(self) -> None:
        if self._closed:
            raise StoreUnavailable("the store is closed: the server is shutting down")

    def close(self) -> None:
        self._closed = True

    def _change(self, decide: Callable[[Batch], T]) -> T:
        with self._changing:
            self.check()
            batch = Batch(self._index, self._epochs, self._clock, self._limits)
            outcome = decide(batch)
            self._index.apply(batch.changes)
            return outcome

"""A wrapper around any store that measures its operations and records its failures."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from mxserver.store import Publication, Query, RecordKey, SourceRecord, SourceStore, Status, StoreUnavailable
from mxserver.telemetry.events import Events
from mxserver.telemetry.metrics import Metrics
from mxserver.wire import StaleEpoch


class ObservedStore(SourceStore):
    """Passes each call to the wrapped store and counts it. Thread-safe, as far as that store is."""

    def __init__(self, store: SourceStore, metrics: Metrics, events: Events) -> None:
        self._store = store
        self.turns = store.turns
        self._metrics = metrics
        self._events = events
        self._seconds = {name: metrics.store_seconds.labels(name) for name in _OPERATIONS}
        self._errors = {name: metrics.store_errors.labels(name) for name in _OPERATIONS}

    def publish(self, publication: Publication) -> SourceRecord:
        with self._observed("publish"):
            return self._store.publish(publication)

    def update_status(
        self, key: RecordKey, status: Status, *, epoch: int = 0, source_load: float | None = None, owner: str = ""
    ) -> None:
        with self._observed("update_status"):
            self._store.update_status(key, status, epoch=epoch, source_load=source_load, owner=owner)

    def get(self, source_id: str, worker_id: str) -> SourceRecord | None:
        with self._observed("get"):
            return self._store.get(source_id, worker_id)

    def whole_worker(self, record: SourceRecord) -> bytes | None:
        with self._observed("whole_worker"):
            return self._store.whole_worker(record)

    def find(self, query: Query) -> list[SourceRecord]:
        with self._observed("find"):
            return self._store.find(query)

    def sweep(self) -> tuple[int, int]:
        with self._observed("sweep"):
            expired, deleted = self._store.sweep()
        if expired:
            self._metrics.leases_expired.inc(expired)
            self._events.add("lease", f"{expired} workers became stale: no heartbeat in time")
        self._metrics.records_deleted.inc(deleted)
        return expired, deleted

    def waits_for_disk(self, key: RecordKey, status: Status) -> bool:
        return self._store.waits_for_disk(key, status)

    def check(self) -> None:
        with self._observed("check"):
            self._store.check()

    def close(self) -> None:
        self._store.close()

    @contextmanager
    def _observed(self, operation: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        except StoreUnavailable as error:
            self._errors[operation].inc()
            self._events.add("store", str(error))
            raise
        except StaleEpoch as error:
            self._metrics.epochs_refused.inc()
            self._events.add("epoch", str(error))
            raise
        finally:
            self._seconds[operation].observe(time.perf_counter() - started)


_OPERATIONS = ("publish", "update_status", "get", "whole_worker", "find", "sweep", "check")

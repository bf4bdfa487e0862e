"""The records in memory: found by source id and by model name, judged by their leases.

A record becomes STALE by time for every reader at once; nothing has to be written for it.
"""

from __future__ import annotations

import heapq
import itertools
import threading
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

from mxserver.store.clock import Clock
from mxserver.store.errors import NotOwner, UnknownRecord
from mxserver.store.interface import Leases, Query, RecordKey, SourceRecord, Status
from mxserver.store.stored_amount import StoredAmount
from mxserver.wire import StaleEpoch
from mxserver.wire.proto import p2p_pb2

STALE = p2p_pb2.SOURCE_STATUS_STALE

Name = TypeVar("Name", bound=Hashable)


def require_epoch(record: SourceRecord, epoch: int) -> None:
    """Raises StaleEpoch when the epoch is not of the record's present life. 0 means no epoch, and passes.

    One above the record's last was not given to it: an earlier life has it from a file that was lost, when the clock
    was later than it is now.
    """
    if 0 < epoch < record.life:
        raise stale_epoch(record.key, epoch, record.life)
    if epoch > record.epoch:
        raise never_given(record.key, epoch, record.epoch)


def stale_epoch(key: RecordKey, epoch: int, life: int) -> StaleEpoch:
    return StaleEpoch(
        f"source {key.source_id}, worker {key.worker_id}, rank {key.worker_rank}: epoch {epoch} is older than "
        f"{life}; a newer life of this worker has published, this one must stop acting for it"
    )


def never_given(key: RecordKey, epoch: int, last: int) -> StaleEpoch:
    return StaleEpoch(
        f"source {key.source_id}, worker {key.worker_id}, rank {key.worker_rank}: epoch {epoch} was never given, the "
        f"last one is at most {last}; publish without an epoch to begin a new life"
    )


def require_owner(record: SourceRecord, owner: str) -> None:
    """Raises NotOwner when both the record's owner and the caller are known and not the same."""
    if owner and record.owner and owner != record.owner:
        raise not_owner(record.key, owner)


def not_owner(key: RecordKey, owner: str) -> NotOwner:
    return NotOwner(
        f"source {key.source_id}, worker {key.worker_id}, rank {key.worker_rank} was published by another caller than "
        f"{owner!r}; a worker changes only its own record"
    )


def unknown(key: RecordKey) -> UnknownRecord:
    return UnknownRecord(
        f"source {key.source_id}, worker {key.worker_id}, rank {key.worker_rank} is not known; publish it first"
    )


@dataclass(slots=True)
class _Entry:
    record: SourceRecord
    renewed_at: float  # monotonic seconds
    stale_at: float | None  # since when it is STALE; None while it is not

    def stale_since(self, leases: Leases) -> float:
        """The moment, past or future, from which the record counts as STALE."""
        return self.stale_at if self.stale_at is not None else self.renewed_at + leases.heartbeat_seconds


class RecordIndex:
    """All records, with their leases. Thread-safe; every call reads the clock itself."""

    def __init__(self, leases: Leases, clock: Clock) -> None:
        self._leases = leases
        self._clock = clock
        self._lock = threading.Lock()
        self._entries: dict[RecordKey, _Entry] = {}
        self._amount = StoredAmount()
        # Dictionaries as ordered sets: the order decides nothing, but keeps runs repeatable.
        self._by_source: dict[str, dict[RecordKey, None]] = {}
        self._by_rank: dict[tuple[str, int], dict[Status, dict[RecordKey, None]]] = {}  # by the status that was stored
        self._by_worker: dict[tuple[str, str], dict[RecordKey, None]] = {}
        self._by_model: dict[str, dict[RecordKey, None]] = {}

    def load(self, records: Iterable[SourceRecord]) -> None:
        """Takes over the records of an earlier run. Workers that were alive get a whole new lease."""
        now_ms = self._clock.unix_ms()
        self.apply({r.key: r if r.status == STALE else replace(r, updated_at_ms=now_ms) for r in records})

    def get(self, key: RecordKey) -> SourceRecord | None:
        """The record as it is now; None when there is none (any more)."""
        with self._lock:
            entry = self._entries.get(key)
            return self._view(entry, self._clock.monotonic_seconds()) if entry else None

    def get_lowest(self, source_id: str, worker_id: str) -> SourceRecord | None:
        """The record of the worker's lowest rank."""
        with self._lock:
            now = self._clock.monotonic_seconds()
            keys = self._by_worker.get((source_id, worker_id), ())
            views = [view for key in keys if (view := self._view(self._entries[key], now))]
        return min(views, key=lambda view: view.key.worker_rank, default=None)

    def amount(self) -> StoredAmount:
        """What is stored, with what has expired and was not swept yet."""
        with self._lock:
            return self._amount

    def records_of(self, source_id: str, worker_id: str) -> int:
        with self._lock:
            return len(self._by_worker.get((source_id, worker_id), ()))

    def find(self, query: Query) -> list[SourceRecord]:
        model_name = None if query.model_name is None else query.model_name.lower()
        with self._lock:
            now = self._clock.monotonic_seconds()
            keys = self._candidates(query, model_name)
            views = [view for key in keys if (view := self._view(self._entries[key], now))]
        fitting = [
            record
            for record in views
            if (model_name is None or record.model_name.lower() == model_name)
            and (query.status is None or record.status == query.status)
            and (query.worker_rank is None or record.key.worker_rank == query.worker_rank)
            and (query.min_updated_at_ms is None or record.updated_at_ms >= query.min_updated_at_ms)
        ]
        if query.limit is not None and query.limit < len(fitting):
            return heapq.nlargest(query.limit, fitting, key=_age_order)
        return sorted(fitting, key=_age_order, reverse=True)

    def _candidates(self, query: Query, model_name: str | None) -> Iterable[RecordKey]:
        """Keys of all records that may fit, and not many others. Called with the lock."""
        if query.source_id is None:
            return self._entries if model_name is None else self._by_model.get(model_name, ())
        if query.worker_rank is None:
            return self._by_source.get(query.source_id, ())
        by_status = self._by_rank.get((query.source_id, query.worker_rank), {})
        if query.status is None or query.status == STALE:  # which records become by time
            return itertools.chain.from_iterable(by_status.values())
        return by_status.get(query.status, ())

    def renew(self, key: RecordKey, status: Status, epoch: int, source_load: float | None, owner: str = "") -> bool:
        """A heartbeat that changes no status. Returns False, and does nothing, if the status would change.

        Raises UnknownRecord, StaleEpoch and NotOwner.
        """
        with self._lock:
            now = self._clock.monotonic_seconds()
            entry = self._entries.get(key)
            view = self._view(entry, now) if entry else None
            if entry is None or view is None:
                raise unknown(key)
            require_owner(view, owner)
            require_epoch(view, epoch)
            if view.status != status:
                return False
            if status != STALE:
                load = entry.record.source_load if source_load is None else source_load
                entry.record = replace(entry.record, updated_at_ms=self._clock.unix_ms(), source_load=load)
                entry.renewed_at = now
            return True

    def apply(self, changes: Mapping[RecordKey, SourceRecord | None]) -> None:
        """Stores records (with a new lease, unless STALE) and removes those that are None."""
        with self._lock:
            now = self._clock.monotonic_seconds()
            for key, record in changes.items():
                old = self._take_out(key)
                if record is None:
                    continue
                stale_at = None
                if record.status == STALE:
                    known = (
                        old is not None and self._view(old, now) is not None
                    )  # not one that has expired but was not swept yet
                    stale_at = min(now, old.stale_since(self._leases)) if old and known else now
                self._entries[key] = _Entry(record, now, stale_at)
                self._amount += StoredAmount(1, record.payload_bytes)
                self._by_source.setdefault(key.source_id, {})[key] = None
                of_rank = self._by_rank.setdefault((key.source_id, key.worker_rank), {})
                of_rank.setdefault(record.status, {})[key] = None
                self._by_worker.setdefault(key[:2], {})[key] = None
                self._by_model.setdefault(record.model_name.lower(), {})[key] = None

    def due(self) -> tuple[list[SourceRecord], list[RecordKey]]:
        """What time has changed and no batch has written yet: records that became STALE, and keys that expired."""
        stale, gone = [], []
        with self._lock:
            now = self._clock.monotonic_seconds()
            for key, entry in self._entries.items():
                view = self._view(entry, now)
                if view is None:
                    gone.append(key)
                elif view is not entry.record:
                    stale.append(view)
        return stale, gone

    def _view(self, entry: _Entry, now: float) -> SourceRecord | None:
        stale_since = entry.stale_since(self._leases)
        if now < stale_since:
            return entry.record
        if now >= stale_since + self._leases.collect_seconds:
            return None
        return entry.record if entry.record.status == STALE else replace(entry.record, status=STALE)

    def _take_out(self, key: RecordKey) -> _Entry | None:
        entry = self._entries.pop(key, None)
        if entry is None:
            return None
        self._amount += StoredAmount(-1, -entry.record.payload_bytes)
        _drop(self._by_source, key.source_id, key)
        of_rank = self._by_rank[key.source_id, key.worker_rank]
        _drop(of_rank, entry.record.status, key)
        if not of_rank:
            del self._by_rank[key.source_id, key.worker_rank]
        _drop(self._by_worker, key[:2], key)
        _drop(self._by_model, entry.record.model_name.lower(), key)
        return entry


def _drop(index: dict[Name, dict[RecordKey, None]], name: Name, key: RecordKey) -> None:
    index[name].pop(key)
    if not index[name]:
        del index[name]


def _age_order(record: SourceRecord) -> tuple[int, int]:
    return record.updated_at_ms, record.epoch

"""Changes to records that are kept together or not at all."""

from __future__ import annotations

import queue
from collections import Counter
from dataclasses import replace
from typing import TypeVar

from mxserver.limits import DEFAULT, ServerLimits
from mxserver.store.clock import Clock
from mxserver.store.index import STALE, RecordIndex, never_given, require_epoch, require_owner, unknown
from mxserver.store.interface import Publication, RecordKey, SourceRecord, Status
from mxserver.store.stored_amount import StoredAmount, require_room
from mxserver.wire.proto import p2p_pb2

UNKNOWN = p2p_pb2.SOURCE_STATUS_UNKNOWN
INITIALIZING = p2p_pb2.SOURCE_STATUS_INITIALIZING


CLOCK_SET_BACK_MS = 7 * 24 * 3600 * 1000
"""A live worker of a file or database that was lost may have an epoch so far above a clock that was set back since."""

Waiting = TypeVar("Waiting")


def take_waiting(waiting: queue.SimpleQueue[Waiting | None], first: Waiting, most: int) -> list[Waiting]:
    """`first`, and what waits in the queue behind it, up to `most` in all; stops before None, which ends the queue."""
    taken = [first]
    while len(taken) < most:
        try:
            following = waiting.get_nowait()
        except queue.Empty:
            break
        if following is None:
            waiting.put(None)  # for the next call; nothing comes after it
            break
        taken.append(following)
    return taken


class EpochCounter:
    """The last epoch handed out. Used by one thread at a time."""

    def __init__(self, last: int) -> None:
        self.last = last

    def next(self) -> int:
        self.last += 1
        return self.last


class Batch:
    """Decides changes one after the other, each on top of the earlier ones. The index does not see them yet.

    The caller writes `changes` and then passes them to `RecordIndex.apply`. An epoch handed out in a batch that could
    not be written is not used again. Used by one thread at a time.
    """

    def __init__(self, index: RecordIndex, epochs: EpochCounter, clock: Clock, limits: ServerLimits = DEFAULT) -> None:
        self._index = index
        self._limits = limits
        self._added = StoredAmount()  # by this batch
        self._added_of: Counter[tuple[str, str]] = Counter()  # records, by worker
        self._epochs = epochs
        self._clock = clock
        self.changes: dict[RecordKey, SourceRecord | None] = {}
        self.published: set[RecordKey] = set()  # those of `changes` with another identity or other metadata

    def publish(self, publication: Publication) -> SourceRecord:
        """Raises StaleEpoch, NotOwner and StoreFull."""
        key = publication.key
        # An earlier file's epochs are not above the time that the clock had then. Those above both were never given,
        # and need not fit a column.
        last = max(self._epochs.last, self._clock.unix_ms() + CLOCK_SET_BACK_MS)
        if publication.epoch > last:
            raise never_given(key, publication.epoch, last)
        current = self._current(key)
        if current is not None:
            require_owner(current, publication.owner)
            require_epoch(current, publication.epoch)
        payload_bytes = len(publication.identity) + len(publication.worker)
        self._require_room(key, current, payload_bytes)
        status = publication.status
        if status == UNKNOWN:
            status = INITIALIZING if current is None or current.status == STALE else current.status
        self._epochs.last = max(self._epochs.last, publication.epoch)
        epoch = self._epochs.next()
        record = SourceRecord(
            key=key,
            status=status,
            epoch=epoch,
            life=current.life if current and publication.epoch else publication.epoch or epoch,
            updated_at_ms=self._clock.unix_ms(),
            identity=publication.identity,
            worker=publication.worker,
            model_name=publication.model_name,
            accelerator=publication.accelerator,
            topology=publication.topology,
            endpoint=publication.endpoint,
            source_load=current.source_load if current else None,
            owner=publication.owner or (current.owner if current else ""),
            payload_bytes=payload_bytes,
        )
        self._added += StoredAmount(current is None, payload_bytes - (current.payload_bytes if current else 0))
        self._added_of[key[:2]] += current is None
        self.changes[key] = record
        self.published.add(key)
        return record

    def update_status(
        self, key: RecordKey, status: Status, epoch: int, source_load: float | None, owner: str = ""
    ) -> None:
        """Raises UnknownRecord, StaleEpoch and NotOwner."""
        current = self._current(key)
        if current is None:
            raise unknown(key)
        require_owner(current, owner)
        require_epoch(current, epoch)
        self.changes[key] = replace(
            current,
            status=status,
            updated_at_ms=self._clock.unix_ms(),
            source_load=current.source_load if source_load is None else source_load,
        )

    def sweep(self) -> tuple[int, int]:
        """Adds what time has changed. Returns how many records became STALE, and how many are deleted."""
        stale, gone = self._index.due()
        expired = [record for record in stale if record.key not in self.changes]
        deleted = [key for key in gone if key not in self.changes]
        self.changes.update((record.key, record) for record in expired)
        self.changes.update((key, None) for key in deleted)
        return len(expired), len(deleted)

    def _require_room(self, key: RecordKey, current: SourceRecord | None, payload_bytes: int) -> None:
        """Raises StoreFull for a new record, or a larger one, that the limits do not allow."""
        stored = self._index.amount() + self._added
        of_worker = self._index.records_of(*key[:2]) + self._added_of[key[:2]]
        more = payload_bytes - (current.payload_bytes if current else 0)
        require_room(self._limits, current is None, stored, of_worker, more)

    def _current(self, key: RecordKey) -> SourceRecord | None:
        return self.changes[key] if key in self.changes else self._index.get(key)

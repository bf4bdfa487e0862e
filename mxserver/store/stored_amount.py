"""How much is stored, what may be added to it, and which part of a record stays in memory."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from mxserver.calls import without_large_fields
from mxserver.limits import ServerLimits
from mxserver.store.errors import StoreFull
from mxserver.store.interface import SourceRecord
from mxserver.wire.proto import record_pb2

LARGE_BYTES = 16 * 1024
"""Of a worker's metadata: more than this stays on the disk, where the store has one."""


class StoredAmount(NamedTuple):
    """Records, and the bytes of what was published."""

    records: int = 0
    payload_bytes: int = 0

    def __add__(self, other: object) -> StoredAmount:
        assert isinstance(other, StoredAmount)  # noqa: S101 - tuples would be joined
        return StoredAmount(self.records + other.records, self.payload_bytes + other.payload_bytes)


def full(limits: ServerLimits, limit: str) -> StoreFull:
    """The refusal of a publish for this limit."""
    found = {
        "records": "the store is full of records",
        "records_per_worker": "this worker of this source has as many records, one a rank, as it may have",
        "stored_bytes": "the store is full: there is no room for this metadata",
    }[limit]
    return StoreFull(limits.refusal(limit, found))


def require_room(limits: ServerLimits, is_new: bool, stored: StoredAmount, of_worker: int, more_bytes: int) -> None:
    """Raises StoreFull where a publish would exceed a limit: beside `stored`, and the worker's records."""
    if is_new and stored.records >= limits.records:
        raise full(limits, "records")
    if is_new and of_worker >= limits.records_per_worker:
        raise full(limits, "records_per_worker")
    if more_bytes > 0 and stored.payload_bytes + more_bytes > limits.stored_bytes:
        raise full(limits, "stored_bytes")


def without_large_parts(record: SourceRecord) -> SourceRecord:
    """The record as it is kept in memory: of large metadata only what the server itself reads."""
    if record.worker_is_cut or len(record.worker) <= LARGE_BYTES:
        return record
    return replace(record, worker=small_part(record.worker), worker_is_cut=True)


def small_part(worker: bytes) -> bytes:
    """What the server itself reads of a worker's metadata."""
    facts = record_pb2.WorkerFacts.FromString(without_large_fields(worker, record_pb2.WorkerFacts.DESCRIPTOR))
    facts.DiscardUnknownFields()
    return facts.SerializeToString()

"""Which sources a worker is told of when it cannot be told of all: by place, then by load, then others for each one."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache

from mxserver.store import SourceRecord
from mxserver.wire.calls import shared_levels
from mxserver.wire.proto import p2p_pb2

__all__ = ["nearest", "reference"]

_BITS = (1 << 64) - 1
_ODD = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio: spreads what differs in any bit over the high ones


def nearest(
    records: Iterable[SourceRecord], asker: str, topology: Mapping[str, str], levels: Sequence[str], most: int
) -> list[SourceRecord]:
    """`most` of the records, in the order in which `asker` should take them.

    First those that share the narrowest of `levels` (named from broad to narrow) with its `topology`, of these the
    least loaded. Equals are ordered by a hash of both names (rendezvous hashing), so that many who ask at the same
    time do not all get the same ones, and one who asks again gets the same.
    """
    asking = _hash(asker)

    def order(record: SourceRecord) -> tuple[int, float, int]:
        spread = (_hash(record.key.worker_id) ^ asking) * _ODD & _BITS
        return -shared_levels(record.topology, topology, levels), record.source_load or 0.0, spread

    return heapq.nsmallest(most, records, key=order)


@lru_cache(1 << 16)
def _hash(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def reference(record: SourceRecord) -> p2p_pb2.SourceInstanceRef:
    """What lists say of a record."""
    return p2p_pb2.SourceInstanceRef(
        mx_source_id=record.key.source_id,
        worker_id=record.key.worker_id,
        model_name=record.model_name,
        worker_rank=record.key.worker_rank,
        accelerator=record.accelerator,
        updated_at=record.updated_at_ms,
        topology=record.topology,
        source_load=record.source_load,
        worker_grpc_endpoint=record.endpoint,
        owner=record.owner,
    )

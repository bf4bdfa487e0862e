"""Which sources a worker is told of when it cannot be told of all: by place, then by load, then others for each one."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence

from mxserver.store import SourceRecord
from mxserver.wire.calls import shared_levels
from mxserver.wire.proto import p2p_pb2

__all__ = ["nearest", "reference"]


def nearest(
    records: Iterable[SourceRecord], asker: str, topology: Mapping[str, str], levels: Sequence[str]
) -> list[SourceRecord]:
    """The records in the order in which `asker` should take them.

    First those that share the narrowest of `levels` (named from broad to narrow) with its `topology`, of these the
    least loaded. Equals are ordered by a hash of both names (rendezvous hashing), so that many who ask at the same
    time do not all get the same ones, and one who asks again gets the same.
    """

    def order(record: SourceRecord) -> tuple[int, float, bytes]:
        spread = hashlib.blake2b(f"{asker}/{record.key.worker_id}".encode(), digest_size=8).digest()
        return -shared_levels(record.topology, topology, levels), record.source_load or 0.0, spread

    return sorted(records, key=order)


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

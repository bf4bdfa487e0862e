"""Which sources a worker is told of when it cannot be told of all: by place, then by load, then others for each one."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence

from mxserver.store import SourceRecord
from mxserver.wire.calls import shared_levels

__all__ = ["nearest"]


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

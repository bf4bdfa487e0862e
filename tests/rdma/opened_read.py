"""A receiver's part by hand, up to its first READ: lease, agent over RDMA alone, the holder's memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np

from mxcore.transfer.layout import Chunks
from mxcore.transfer.move import AgentSession, Move, Source, SourceClient
from mxcore.transfer.route import UcxPolicy
from mxserver.wire.proto import mx_pb2
from tests.transfer.test_exchange import CHUNK_BYTES, Target


class OpenedRead(NamedTuple):
    session: AgentSession
    peer: str
    moves: list[Move]

    def run(self, moves: list[Move]) -> list[int]:
        """Chunks, in the order in which they came."""
        return list(self.session.run("read", moves, self.peer, in_flight_limit=4))


@contextmanager
def opened_read(source: Source, target: Target) -> Iterator[OpenedRead]:
    chunks = Chunks(target.layout, CHUNK_BYTES)
    with (
        SourceClient(source, timeout_seconds=20) as client,
        AgentSession("target", tls=UcxPolicy.from_environment("auto").one_sided(), stall_timeout_seconds=20) as session,
    ):
        session.register(target.layout, target.placement)
        lease_id = client.prepare()
        extents = [mx_pb2.Extent(address=address) for address in target.placement.addresses]
        answer = client.open_transfer(
            lease_id, target.layout.fingerprint, session.metadata(), extents, mx_pb2.OPERATION_READ
        )
        peer = session.connect(answer.nixl_metadata)
        remote = chunks.addresses([extent.address for extent in answer.extents])
        local = chunks.local_addresses(target.placement)
        moves = [
            Move(chunk, *(chunks.slice_of(values, chunk) for values in (local, remote, chunks.lengths)))
            for chunk in range(len(chunks))
        ]
        yield OpenedRead(session, peer, moves)


def snapshot(target: Target) -> dict[str, bytes]:
    return {name: storage.tobytes() for name, storage in target.tensors.storages.items()}


def changed(target: Target, before: dict[str, bytes]) -> list[str]:
    """Names of storages that have other bytes than then."""
    storages = target.tensors.storages
    return [name for name, old in before.items() if not np.array_equal(storages[name], np.frombuffer(old, np.uint8))]

"""Flipped bytes: in a holder's memory after its digests were made, and in a receiver's after they arrived."""

from __future__ import annotations

import itertools
import socket
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from mxcore.sockets import SocketReads
from mxcore.transfer.layout import (
    ChunkRequest,
    Layout,
    LocalTensor,
    Placement,
    all_chunks,
    build_layout,
    scalars_digest,
)
from mxcore.transfer.move import AgentSession, show_token
from mxcore.transfer.receive import ReceivedChunks
from mxcore.transfer.serve import ChunkListener, Holder
from mxserver.wire.proto import mx_pb2

CHUNK_BYTES = 64 << 10
CHUNKS = 256
MODEL_BYTES = CHUNKS * CHUNK_BYTES - 12_345  # the last chunk is short
TENSORS = 40
SECONDS = 60.0

Memory = np.ndarray[Any, np.dtype[np.uint8]]


@dataclass(frozen=True)
class Flips:
    """`made` flips, `caught` flips; `false_alarms`: right chunks that were refused."""

    made: int
    caught: int
    false_alarms: int


class _Pair:
    """A holder and a receiver of this process, over TCP as between hosts: the holder sends, or WRITEs by NIXL."""

    def __init__(self, chance: np.random.Generator) -> None:
        self.there: Memory = chance.integers(0, 256, MODEL_BYTES, np.uint8)
        self.here: Memory = np.ones(MODEL_BYTES, np.uint8)
        layout, placement = _layout(self.there)
        self.holder = Holder(
            layout, placement, partial(AgentSession, "source", tls="tcp,self"), chunk_bytes=CHUNK_BYTES
        )
        layout, placement = _layout(self.here)
        self.session = AgentSession("target", tls="tcp,self")
        self.session.register(layout, placement)
        self.received = ReceivedChunks(layout, placement, scalar_names=(), progress=None, chunk_bytes=CHUNK_BYTES)
        self.received.admit("the source", _answer(self.holder))
        self.lease = self.holder.grant().lease_id
        self.holder.open_transfer(self.lease, self.session.metadata(), placement.addresses)
        self.port = ChunkListener(self.holder, "127.0.0.1", 0)

    def move(self, *, by_nixl: bool) -> int:
        """Receives all chunks; returns how many are refused, by digests of memory or those made in transfer."""
        if by_nixl:
            for _ in self.holder.push(self.lease, range(CHUNKS), lambda: False):
                pass
            return self.refused()
        chunks, found = self.received.chunks, 0
        lease = self.holder.grant().lease_id
        with socket.create_connection(("127.0.0.1", self.port.port), SECONDS) as connection:
            show_token(connection, self.holder.open_sending(lease), SECONDS)
            reads = SocketReads([connection], hashed=True)
            self.holder.ask(lease, ChunkRequest(all_chunks(CHUNKS), 0, CHUNKS), 0)
            for chunk in range(CHUNKS):
                reads.ask(
                    chunk, *(chunks.slice_of(values, chunk) for values in (self.received.addresses, chunks.lengths))
                )
            while ended := reads.ended(SECONDS):
                found += sum(not self.received.verify(chunk, digest) for chunk, _, digest in ended)
            reads.close()
        self.holder.release(lease)
        return found

    def refused(self) -> int:
        """How many chunks do not match their digests."""
        return sum(not self.received.verify(chunk) for chunk in range(CHUNKS))

    def close(self) -> None:
        self.port.close()
        self.holder.close()
        self.session.fence()


def flip_bytes(count: int, seed: int) -> Flips:
    """Flips `count` bytes, half of them at the source and half on arrival, one in each chunk of a transfer.

    Every second transfer goes by NIXL.
    """
    chance = np.random.default_rng(seed)
    pair = _Pair(chance)
    made = caught = false_alarms = 0
    ways = itertools.cycle((False, True))
    try:
        while made < count:
            at_source, by_nixl = made < count / 2, next(ways)
            memory = pair.there if at_source else pair.here
            places = _places(chance, min(CHUNKS, count - made))
            masks = chance.integers(1, 256, len(places), np.uint8)
            if not at_source:
                pair.move(by_nixl=by_nixl)
            memory[places] ^= masks
            caught += pair.move(by_nixl=by_nixl) if at_source else pair.refused()
            made += len(places)
            memory[places] ^= masks
            false_alarms += pair.move(by_nixl=by_nixl)
    finally:
        pair.close()
    return Flips(made, caught, false_alarms)


def _places(chance: np.random.Generator, count: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """A place in each of `count` chunks."""
    begins = chance.permutation(CHUNKS)[:count] * CHUNK_BYTES
    lengths = np.minimum(CHUNK_BYTES, MODEL_BYTES - begins)
    inside: np.ndarray[Any, np.dtype[np.int64]] = (chance.random(count) * lengths).astype(np.int64)
    return inside + begins


def _layout(memory: Memory) -> tuple[Layout, Placement]:
    address = int(memory.ctypes.data)
    cuts = [MODEL_BYTES * i // TENSORS for i in range(TENSORS + 1)]
    tensors = [
        LocalTensor(f"t{i:03}", "torch.uint8", (end - begin,), (1,), address + begin, 1, address, MODEL_BYTES, "cpu", 0)
        for i, (begin, end) in enumerate(itertools.pairwise(cuts))
    ]
    return build_layout("raw", tensors)


def _answer(holder: Holder) -> mx_pb2.GetLayoutResponse:
    return mx_pb2.GetLayoutResponse(
        fingerprint=holder.layout.fingerprint,
        chunk_bytes=CHUNK_BYTES,
        digest_kind=holder.digests.kind,
        digests=holder.digests.values,
        scalars_digest=scalars_digest({}),
    )

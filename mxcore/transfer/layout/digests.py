"""Digests of chunks: their kinds, and who makes them, by the memory that the chunks lie in (docs/digests.md)."""

from __future__ import annotations

from array import array
from typing import Protocol, Self

from mxcore.digest.digest import mixsum_64_many, xxh3_64_many
from mxcore.transfer.layout.chunks import Chunks
from mxcore.transfer.layout.layout import Placement

__all__ = ["DIGEST_BYTES", "KINDS", "MIXSUM", "XXH3", "ChunkDigests", "Digester", "chunk_digests", "digester_of"]

XXH3 = "xxh3-64"
MIXSUM = "mixsum-64"
KINDS = (XXH3, MIXSUM)
DIGEST_BYTES = 8  # little-endian


class ChunkDigests(bytes):
    """8 bytes little-endian a chunk, all of one `kind`; equal only to digests of the same kind. Immutable.

    Plain bytes are taken for xxh3-64 wherever digests are (`of`).
    """

    kind: str

    def __new__(cls, values: bytes = b"", kind: str = XXH3) -> Self:
        made = super().__new__(cls, values)
        made.kind = kind
        return made

    @classmethod
    def of(cls, digests: bytes) -> ChunkDigests:
        """The digests as they are, with a kind."""
        return digests if isinstance(digests, ChunkDigests) else cls(digests)

    def of_chunk(self, chunk: int) -> bytes:
        """One chunk's digest."""
        return self[DIGEST_BYTES * chunk : DIGEST_BYTES * (chunk + 1)]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, bytes):
            return NotImplemented
        return bytes(self) == bytes(other) and self.kind == ChunkDigests.of(other).kind

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(bytes(self))

    def __reduce__(self) -> tuple[object, ...]:
        return (ChunkDigests, (bytes(self), self.kind))


class Digester(Protocol):
    """Makes digests of memory of one sort. Thread-safe. `kind` is what it makes when it may choose."""

    kind: str

    def many(
        self, kind: str, addresses: array[int], lengths: array[int], starts: array[int], *, threads: int = 1
    ) -> bytes:
        """One digest a group of segments, as `mxcore.digest.xxh3_64_many`; waits for what still writes there."""


class HostDigester:
    """Of host memory."""

    kind = XXH3

    def many(
        self, kind: str, addresses: array[int], lengths: array[int], starts: array[int], *, threads: int = 1
    ) -> bytes:
        """See Digester."""
        return {XXH3: xxh3_64_many, MIXSUM: mixsum_64_many}[kind](addresses, lengths, starts, threads=threads)


def digester_of(placement: Placement) -> Digester:
    """Who makes the digests of a placement's memory. Raises LayoutUnsupported for memory that nobody can check."""
    if placement.device_type == "cpu":
        return HostDigester()
    from mxcore.transfer.route.device_memory import (
        proven_device,
    )  # the driver is asked for only where there is device memory

    return proven_device(placement).digester


def chunk_digests(digester: Digester, chunks: Chunks, addresses: array[int], threads: int = 1) -> ChunkDigests:
    """The digests of every chunk in this process' memory, of the digester's own kind."""
    made = digester.many(digester.kind, addresses, chunks.lengths, chunks.segment_starts, threads=threads)
    return ChunkDigests(made, digester.kind)

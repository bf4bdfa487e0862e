"""Digests of chunks: their kinds, and what makes them in host memory (docs/reference/digests.md)."""

from __future__ import annotations

import hashlib
import os
from array import array
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from mxcore.digest import mixsum_64_many, xxh3_64_many
from mxcore.transfer.layout.chunks import Chunks

__all__ = [
    "DIGEST_BYTES",
    "KINDS",
    "MIXSUM",
    "XXH3",
    "ChunkDigests",
    "Digester",
    "HostDigester",
    "chunk_digests",
    "digest_threads",
]

XXH3 = "xxh3-64"
MIXSUM = "mixsum-64"
KINDS = (XXH3, MIXSUM)
DIGEST_BYTES = 8  # little-endian
_MOST_THREADS = 64  # of mxcore.digest; memory is no faster with more


@dataclass(frozen=True)
class ChunkDigests:
    """The digests of a layout's chunks: `values` has 8 bytes little-endian a chunk, all of one `kind`."""

    values: bytes
    kind: str

    def of_chunk(self, chunk: int) -> bytes:
        """One chunk's digest."""
        return self.values[DIGEST_BYTES * chunk : DIGEST_BYTES * (chunk + 1)]

    @cached_property
    def summary(self) -> bytes:
        """What tells these digests from all others: they need not be sent to who has them."""
        return hashlib.sha256(self.kind.encode() + b"\0" + self.values).digest()


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


def digest_threads() -> int:
    """How many threads make digests of much memory: one for each core that this process has, up to 64."""
    return min(len(os.sched_getaffinity(0)), _MOST_THREADS)


def chunk_digests(
    digester: Digester, chunks: Chunks, addresses: array[int], *, kind: str | None = None, threads: int | None = None
) -> ChunkDigests:
    """The digests of every chunk in this process' memory; of the digester's own kind unless one is given.

    Host memory's by so many threads, or by `digest_threads`.
    """
    kind, threads = kind or digester.kind, threads or digest_threads()
    return ChunkDigests(digester.many(kind, addresses, chunks.lengths, chunks.segment_starts, threads=threads), kind)

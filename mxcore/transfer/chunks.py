"""The cut of a layout's bytes into chunks, and the plan of who gives which.

All extents of a layout, one after the other, are its bytes; chunk i is the stretch [i * chunk_bytes, (i + 1) *
chunk_bytes) of them. The cut follows from the layout alone, so that every worker with that layout has the same.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from mxcore.transfer.layout import Layout, Placement

__all__ = ["CHUNK_BYTES", "DIGEST_BYTES", "DIGEST_KIND", "ChunkPlan", "Chunks", "Segment"]

CHUNK_BYTES = 16 * 1024 * 1024
DIGEST_KIND = "xxh3-64"
DIGEST_BYTES = 8  # little-endian


class Segment(NamedTuple):
    """A part of a chunk that lies in one extent; offset and length in bytes."""

    extent: int
    offset: int
    length: int


class Chunks:
    """A layout's chunks as flat arrays of uint64, made for compiled code. Immutable; safe from any thread.

    Chunk i has the segments `segment_starts[i]` to `segment_starts[i + 1]` of `lengths` and of what `addresses`
    returns.
    """

    def __init__(self, layout: Layout, chunk_bytes: int = CHUNK_BYTES) -> None:
        if chunk_bytes <= 0:
            raise ValueError(f"chunk_bytes is {chunk_bytes}; it must be positive")
        self.chunk_bytes = chunk_bytes
        self.total_bytes = layout.total_bytes
        self.segment_starts = array("Q", [0])
        self.lengths = array("Q")
        self._extents = array("Q")
        self._offsets = array("Q")
        room = chunk_bytes
        for extent, size in enumerate(layout.extent_bytes):
            offset = 0
            while offset < size:
                length = min(room, size - offset)
                self._extents.append(extent)
                self._offsets.append(offset)
                self.lengths.append(length)
                offset += length
                room -= length
                if not room:
                    self.segment_starts.append(len(self.lengths))
                    room = chunk_bytes
        if self.segment_starts[-1] != len(self.lengths):
            self.segment_starts.append(len(self.lengths))

    def __len__(self) -> int:
        return len(self.segment_starts) - 1

    def bytes_of(self, chunk: int) -> int:
        """The length of a chunk; all but the last are `chunk_bytes` long."""
        return min(self.chunk_bytes, self.total_bytes - chunk * self.chunk_bytes)

    def segments(self, chunk: int) -> list[Segment]:
        """The parts of a chunk, in the layout's order."""
        span = range(self.segment_starts[chunk], self.segment_starts[chunk + 1])
        return [Segment(self._extents[i], self._offsets[i], self.lengths[i]) for i in span]

    def addresses(self, extent_addresses: Sequence[int]) -> array[int]:
        """The address of every segment of every chunk, for extents that lie at `extent_addresses`."""
        pairs = zip(self._extents, self._offsets, strict=True)
        return array("Q", (extent_addresses[extent] + offset for extent, offset in pairs))

    def local_addresses(self, placement: Placement) -> array[int]:
        """`addresses` of this process."""
        return self.addresses(placement.addresses)

    def slice_of(self, values: array[int], chunk: int) -> array[int]:
        """What belongs to a chunk out of an array with one value a segment."""
        return values[self.segment_starts[chunk] : self.segment_starts[chunk + 1]]


class ChunkPlan:
    """Which chunks are missing, and which holder is asked for which of them. Not thread-safe: one thread owns it.

    A chunk is missing, in flight at one holder, or done. `take` hands missing chunks to a holder, at most
    `in_flight_limit` at a time; `done` and `give_back` end that. A holder that is dropped gets no more chunks and
    what it had in flight is missing again. Holders are named by any string.
    """

    def __init__(self, chunks: Iterable[int], *, in_flight_limit: int) -> None:
        if in_flight_limit <= 0:
            raise ValueError(f"in_flight_limit is {in_flight_limit}; it must be positive")
        self._in_flight_limit = in_flight_limit
        self._missing = deque(chunks)
        self._done: set[int] = set()
        self._in_flight: dict[str, set[int]] = {}
        self._offers: dict[str, frozenset[int] | None] = {}  # None: everything

    @property
    def finished(self) -> bool:
        """Whether every chunk is done."""
        return not self._missing and not any(self._in_flight.values())

    @property
    def completed(self) -> frozenset[int]:
        """The chunks that are done."""
        return frozenset(self._done)

    @property
    def missing(self) -> frozenset[int]:
        """The chunks that nobody is asked for."""
        return frozenset(self._missing)

    def in_flight(self, holder: str) -> frozenset[int]:
        """The chunks that `holder` is asked for."""
        return frozenset(self._in_flight.get(holder, ()))

    def add_holder(self, holder: str, offers: Iterable[int] | None = None) -> None:
        """Makes a holder known, or renews what it offers; None: every chunk."""
        self._offers[holder] = None if offers is None else frozenset(offers)
        self._in_flight.setdefault(holder, set())

    def drop_holder(self, holder: str) -> list[int]:
        """Forgets a holder; returns the chunks that are missing again because of it."""
        self._offers.pop(holder, None)
        lost = sorted(self._in_flight.pop(holder, ()))
        self._missing.extendleft(reversed(lost))
        return lost

    def take(self, holder: str, limit: int | None = None) -> list[int]:
        """Chunks to ask `holder` for, now in flight; empty when it may get no more, or offers nothing missing."""
        offers = self._offers[holder]
        in_flight = self._in_flight[holder]
        room = self._in_flight_limit - len(in_flight)
        wanted = room if limit is None else min(room, limit)
        taken = list(_pick(self._missing, offers, wanted))
        in_flight.update(taken)
        return taken

    def done(self, holder: str, chunk: int) -> None:
        """A chunk of `holder` has arrived and is right."""
        self._in_flight[holder].remove(chunk)
        self._done.add(chunk)

    def give_back(self, holder: str, chunk: int) -> None:
        """A chunk of `holder` failed: it is missing again, after all others."""
        self._in_flight[holder].remove(chunk)
        self._missing.append(chunk)

    def reopen(self, chunks: Iterable[int]) -> None:
        """Chunks that were done are missing again."""
        for chunk in sorted(chunks):
            self._done.remove(chunk)
            self._missing.append(chunk)


def _pick(missing: deque[int], offers: frozenset[int] | None, wanted: int) -> Iterator[int]:
    for _ in range(len(missing)):
        if wanted <= 0:
            return
        chunk = missing.popleft()
        if offers is None or chunk in offers:
            wanted -= 1
            yield chunk
        else:
            missing.append(chunk)

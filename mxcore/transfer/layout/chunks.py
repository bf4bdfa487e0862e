"""How a layout's bytes are cut into chunks.

All extents of a layout, one after the other, are its bytes; chunk i is the stretch [i * chunk_bytes, (i + 1) *
chunk_bytes) of them. The cut follows from the layout alone, so that every worker with that layout has the same.
"""

from __future__ import annotations

from array import array
from collections.abc import Collection, Sequence

from mxcore.transfer.layout.layout import Layout, Placement
from mxcore.transfer.layout.plan import chunk_set, chunks_of

__all__ = ["CHUNK_BYTES", "Chunks"]

CHUNK_BYTES = 16 * 1024 * 1024


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

    def addresses(self, extent_addresses: Sequence[int]) -> array[int]:
        """The address of every segment of every chunk, for extents that lie at `extent_addresses`."""
        pairs = zip(self._extents, self._offsets, strict=True)
        return array("Q", (extent_addresses[extent] + offset for extent, offset in pairs))

    def local_addresses(self, placement: Placement) -> array[int]:
        """`addresses` of this process."""
        return self.addresses(placement.addresses)

    def touched(self, layout: Layout, placement: Placement, chunks: int) -> tuple[Layout, Placement]:
        """The extents that some of these chunks lie in, as a layout without names, and where they are."""
        extents = sorted(self.extents_of(chunks))
        addresses = tuple(placement.addresses[extent] for extent in extents)
        devices = tuple(placement.device_indices[extent] for extent in extents)
        sizes = tuple(layout.extent_bytes[extent] for extent in extents)
        return Layout(layout.kind, (), sizes), Placement(addresses, devices, placement.device_type)

    def extents_of(self, chunks: int) -> set[int]:
        """The extents that some of a set of chunks lie in."""
        return {extent for chunk in chunks_of(chunks) for extent in self.slice_of(self._extents, chunk)}

    def covering(self, extents: Collection[int]) -> int:
        """The set of chunks that have any byte of these extents."""
        wanted = frozenset(extents)
        return chunk_set(
            chunk for chunk in range(len(self)) if not wanted.isdisjoint(self.slice_of(self._extents, chunk))
        )

    def slice_of(self, values: array[int], chunk: int) -> array[int]:
        """What belongs to a chunk out of an array with one value a segment."""
        return values[self.segment_starts[chunk] : self.segment_starts[chunk + 1]]

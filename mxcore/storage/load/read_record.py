"""What was read from files straight into host memory, with digests made on the way: is it still there?

Memory that breaks between a read and the digests that are made of it afterwards would give wrong bytes right digests.
"""

from __future__ import annotations

import ctypes
import logging
from array import array
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from mxcore.digest import xxh3_64_many
from mxcore.memory import HostBuffer
from mxcore.storage.checkpoint import Checkpoint
from mxcore.storage.load.host_load import read_rows
from mxcore.storage.plan import Row

__all__ = ["ReadCheck", "ReadRecord"]

_log = logging.getLogger(__name__)

_GROUP_BYTES = 8 << 20  # of one digest: a read of several uses several threads
_DIGEST_BYTES = 8
_FEW_BITS = 64  # of a group: more than broken memory changes, fewer than a loader that computes


@dataclass(frozen=True)
class ReadCheck:
    """What `ReadRecord.check` found.

    `compared_bytes` were compared with what was read. Where a few bits differed, `repaired_bits`, memory is broken, and
    the bytes were written again from the file. `changed_bytes` are in groups of which more differs: whoever loads may
    compute there.
    """

    compared_bytes: int = 0
    repaired_bits: int = 0
    changed_bytes: int = 0


@dataclass(frozen=True)
class _Group:
    checkpoint: Checkpoint
    rows: tuple[Row, ...]
    digest: bytes  # XXH3-64, little-endian

    @property
    def size_bytes(self) -> int:
        return sum(row[2] * row[4] for row in self.rows)

    @property
    def bounds(self) -> tuple[int, int]:
        """The first address, and the address after the last."""
        return min(row[5] for row in self.rows), max(row[5] + (row[4] - 1) * row[6] + row[2] for row in self.rows)

    def stretches(self) -> list[tuple[int, int]]:
        """(address, bytes), in the order of the digest."""
        found: list[tuple[int, int]] = []
        for _, _, run_bytes, _, count, address, step in self.rows:
            if step == run_bytes:  # a part of each row in the file, all of them together here
                found.append((address, run_bytes * count))
            else:
                found += [(address + i * step, run_bytes) for i in range(count)]
        return found


class ReadRecord:
    """Groups of rows that were read, with their digests. Not thread-safe; reads of one engine come one at a time."""

    def __init__(self) -> None:
        self._groups: list[_Group] = []

    @staticmethod
    def cut(rows: Sequence[Row]) -> tuple[list[Row], array[int]]:
        """The same bytes as groups for `Reader.read`: the rows, and where each group begins, and the last ends."""
        pieces: list[Row] = []
        starts = array("q", [0])
        held = 0
        for piece in (piece for row in rows for piece in _pieces(row)):
            size_bytes = piece[2] * piece[4]
            if held and held + size_bytes > _GROUP_BYTES:
                starts.append(len(pieces))
                held = 0
            pieces.append(piece)
            held += size_bytes
        if pieces:
            starts.append(len(pieces))
        return pieces, starts

    def note(self, checkpoint: Checkpoint, rows: Sequence[Row], starts: Sequence[int], digests: Sequence[int]) -> None:
        """Records what was read; what is read to the same place later counts instead."""
        for index, digest in enumerate(digests):
            group = tuple(rows[starts[index] : starts[index + 1]])
            self._groups.append(_Group(checkpoint, group, digest.to_bytes(_DIGEST_BYTES, "little")))

    def check(self, memory: Sequence[tuple[int, int]], *, threads: int = 1) -> ReadCheck:
        """Compares what lies within `memory`, (address, bytes) each, which has to exist, and repairs what is broken.

        Raises what reading raises, where something has to be read again.
        """
        groups = self._standing(memory)
        addresses, lengths, starts = array("Q"), array("Q"), array("Q", [0])
        for group in groups:
            for address, length in group.stretches():
                addresses.append(address)
                lengths.append(length)
            starts.append(len(addresses))
        if not groups:
            return ReadCheck()
        found = xxh3_64_many(addresses, lengths, starts, threads=threads)
        repaired_bits = changed_bytes = 0
        for place, group in enumerate(groups):
            if found[_DIGEST_BYTES * place : _DIGEST_BYTES * (place + 1)] != group.digest:
                bits = _repair(group)
                repaired_bits += bits or 0
                changed_bytes += group.size_bytes if bits is None else 0
        return ReadCheck(sum(group.size_bytes for group in groups), repaired_bits, changed_bytes)

    def _standing(self, memory: Sequence[tuple[int, int]]) -> list[_Group]:
        """Groups within that memory over which nothing was read later."""
        extents = sorted((address, address + size) for address, size in memory)
        begins = [begin for begin, _ in extents]
        taken: list[tuple[int, int]] = []  # ascending and apart
        standing: list[_Group] = []
        for group in reversed(self._groups):
            begin, end = group.bounds
            extent = bisect_right(begins, begin) - 1
            if extent < 0 or end > extents[extent][1]:
                continue
            place = bisect_right(taken, (begin, begin))
            before, after = taken[place - 1 : place] if place else [], taken[place : place + 1]
            if any(other_end > begin for _, other_end in before) or any(other < end for other, _ in after):
                continue
            taken.insert(place, (begin, end))
            standing.append(group)
        return standing


def _pieces(row: Row) -> list[Row]:
    """A row in pieces of at most a group's size, in its order."""
    file, offset, run_bytes, step, count, address, to_step = row
    if run_bytes * count <= _GROUP_BYTES:
        return [row]
    if run_bytes <= _GROUP_BYTES:
        most = _GROUP_BYTES // run_bytes
        return [
            (file, offset + i * step, run_bytes, step, min(most, count - i), address + i * to_step, to_step)
            for i in range(0, count, most)
        ]
    return [
        (file, offset + i * step + at, min(_GROUP_BYTES, run_bytes - at), 0, 1, address + i * to_step + at, 0)
        for i in range(count)
        for at in range(0, run_bytes, _GROUP_BYTES)
    ]


def _repair(group: _Group) -> int | None:
    """How many bits differed from the file, and do no more; None: so many that it is no damage."""
    with HostBuffer(group.size_bytes) as right:
        rows: list[Row] = []
        at = right.address
        for file, offset, run_bytes, step, count, _, _ in group.rows:
            rows.append((file, offset, run_bytes, step, count, at, run_bytes))
            at += run_bytes * count
        read_rows(group.checkpoint.files, rows, stamps=group.checkpoint.stamps)
        expected = ctypes.string_at(right.address, group.size_bytes)
    found = b"".join(ctypes.string_at(address, length) for address, length in group.stretches())
    bits = (int.from_bytes(expected, "little") ^ int.from_bytes(found, "little")).bit_count()
    if bits > _FEW_BITS:
        return None
    at = 0
    for address, length in group.stretches():
        ctypes.memmove(address, expected[at : at + length], length)
        at += length
    return bits

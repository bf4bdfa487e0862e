"""What a receive that ended early left in memory, to be completed from elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

from mxcore.errors import DigestMismatch
from mxcore.transfer.layout import chunk_set
from mxcore.transfer.receive.received_chunks import ReceivedChunks

__all__ = ["PartialReceive"]

Report = TypeVar("Report")

_NAMED_CHUNKS = 8


class PartialReceive(Generic[Report]):
    """Some chunks verified in place, the digests of the others known, nothing arriving any more. For one thread.

    `total_bytes` and `missing_bytes` are of all chunks and of those that are missing.
    """

    def __init__(self, received: ReceivedChunks, report: Callable[[int], Report]) -> None:
        """`report` makes the report of the whole, given the bytes that did not come from workers."""
        self._received = received
        self._report = report
        self._checked = False

    @property
    def total_bytes(self) -> int:
        """The size of the whole layout."""
        return self._received.layout.total_bytes

    @property
    def missing_bytes(self) -> int:
        """The bytes of the missing chunks."""
        return sum(map(self._received.chunks.bytes_of, self._missing()))

    def missing_stretches(self) -> list[tuple[int, int]]:
        """The memory that has to be filled: (first address, address after the last), ascending, none adjoining."""
        chunks, addresses = self._received.chunks, self._received.addresses
        pieces = sorted(
            (address, address + length)
            for chunk in self._missing()
            for address, length in zip(
                chunks.slice_of(addresses, chunk), chunks.slice_of(chunks.lengths, chunk), strict=True
            )
        )
        merged: list[tuple[int, int]] = []
        for begin, end in pieces:
            if merged and merged[-1][1] >= begin:
                merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
            else:
                merged.append((begin, end))
        return merged

    def complete(self) -> Report:
        """Call it when the missing memory is filled: compares every chunk with its digest, received ones too.

        Raises DigestMismatch: then nothing of this memory is to be trusted.
        """
        content, chunks = self._received.content, self._received.chunks
        if content is None:
            raise DigestMismatch("nothing was received: there are no digests to compare with")
        missing = self._missing()
        other_bytes = sum(map(chunks.bytes_of, missing))
        found = self._received.digests_here(content.digests.kind)
        if self._received.disputed and self._received.believe(found):  # what the files say is what some holder said
            content = self._received.content or content
        wrong = [chunk for chunk in range(len(chunks)) if found.of_chunk(chunk) != content.digests.of_chunk(chunk)]
        if wrong:
            raise DigestMismatch(
                f"chunks {wrong[:_NAMED_CHUNKS]} ({len(wrong)} of {len(chunks)}) are not what the workers' digests "
                f"promise, {len(set(wrong) & set(missing))} of them among the {len(missing)} that came otherwise"
            )
        self._received.adopt(chunk_set(missing))
        return self._report(other_bytes)

    def _missing(self) -> list[int]:
        if not self._checked:  # an abandoned transfer may have overwritten verified chunks before its fence
            self._received.recheck()
            self._checked = True
        return self._received.missing

"""What a receive that ended early left in memory, for whoever can bring the rest by another way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

from mxcore.errors import DigestMismatch
from mxcore.transfer.layout.plan import chunk_set
from mxcore.transfer.receive.received_chunks import Intake

__all__ = ["PartialReceive"]

Report = TypeVar("Report")

_THREADS = 4  # of digests
_NAMED_CHUNKS = 8


class PartialReceive(Generic[Report]):
    """Verified chunks in place, the digests of the others known, nothing arriving any more. Use it from one thread.

    `total_bytes` and `missing_bytes` are of all chunks and of those that are missing.
    """

    def __init__(self, intake: Intake, report: Callable[[int], Report]) -> None:
        """`report` makes the report of the whole, given the bytes that did not come from workers."""
        self._intake = intake
        self._report = report
        self._checked = False

    @property
    def total_bytes(self) -> int:
        """Of the whole layout."""
        return self._intake.layout.total_bytes

    @property
    def missing_bytes(self) -> int:
        """Of the chunks that are not there."""
        return sum(map(self._intake.chunks.bytes_of, self._missing()))

    def missing_stretches(self) -> list[tuple[int, int]]:
        """The memory that has to be filled: (first address, address after the last), ascending, none adjoining."""
        chunks, addresses = self._intake.chunks, self._intake.addresses
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
        """After the missing memory was filled: compares every chunk with its digest, those that came before too.

        Raises DigestMismatch: then nothing of this memory is to be trusted.
        """
        content, chunks = self._intake.content, self._intake.chunks
        if content is None:
            raise DigestMismatch("nothing was received: there are no digests to compare with")
        missing = self._missing()
        other_bytes = sum(map(chunks.bytes_of, missing))
        found = self._intake.digests_here(content.digests.kind, _THREADS)
        wrong = [chunk for chunk in range(len(chunks)) if found.of_chunk(chunk) != content.digests.of_chunk(chunk)]
        if wrong:
            raise DigestMismatch(
                f"chunks {wrong[:_NAMED_CHUNKS]} ({len(wrong)} of {len(chunks)}) are not what the workers' digests "
                f"promise, {len(set(wrong) & set(missing))} of them among the {len(missing)} that came otherwise"
            )
        self._intake.adopt(chunk_set(missing))
        return self._report(other_bytes)

    def _missing(self) -> list[int]:
        if not self._checked:  # what was given up on may have landed late, before its fence
            self._intake.recheck()
            self._checked = True
        return self._intake.missing

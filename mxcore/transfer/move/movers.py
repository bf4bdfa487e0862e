"""What brings the chunks of one holder here: the interface of all ways to do it, and what those that wait share."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol

from mxcore.errors import TransferError, TransferStalled

__all__ = ["Arrived", "Awaited", "Mover"]

_NAMED_CHUNKS = 5


class Arrived(NamedTuple):
    """A chunk whose bytes are here, not verified; `digest` is their XXH3-64, where it was made on the way."""

    chunk: int
    digest: bytes | None = None


class Mover(Protocol):
    """Fetches chunks from one holder under a lease. Used by one thread, but for `wake` and `interrupt`."""

    @property
    def idle(self) -> bool:
        """Whether everything that was asked for has arrived."""

    def ask(self, chunks: Sequence[int]) -> None:
        """Adds chunks to what is fetched."""

    def arrived(self) -> Iterator[Arrived]:
        """Waits until a chunk is here, `wake`, `interrupt` or the stall time-out; yields the chunks that are here.

        Returns at once when it is idle. Raises PeerLost, SourceRefused, TransferStalled, and what interrupted it.
        """

    def wake(self) -> None:
        """Makes `arrived` return where it waits for others, or the next one; from any thread."""

    def interrupt(self, error: TransferError) -> None:
        """Makes `arrived`, this one or the next, raise `error` instead of waiting on; the first one counts.

        From any thread.
        """

    def close(self) -> None:
        """Ends it: nothing arrives any more, or (by NIXL) once the agent is fenced. Waits for what it began itself.

        Raises FenceFailed when that does not end: the memory may still be written to.
        """


class Awaited:
    """The chunks that were asked for and are not here yet, who interrupts the wait, and how long it may be in vain.

    Used by one thread, but for `interrupt`.
    """

    def __init__(self, silence: str, stall_timeout_seconds: float) -> None:
        """`silence`: what a stall is, up to the chunks: "worker w7 sent nothing of"."""
        self.chunks: set[int] = set()
        self._silence = silence
        self._stall_timeout_seconds = stall_timeout_seconds
        self._error: TransferError | None = None
        self._news_at = 0.0

    def add(self, chunks: Iterable[int]) -> None:
        """More chunks; when there were none, the time counts from now."""
        if not self.chunks:
            self.news()
        self.chunks.update(chunks)

    def remove(self, chunk: int) -> None:
        """A chunk is here, which is news."""
        self.chunks.discard(chunk)
        self.news()

    def news(self) -> None:
        """Something came: the time counts from now."""
        self._news_at = time.monotonic()

    @property
    def seconds_left(self) -> float:
        """Until it is a stall."""
        return max(self._news_at + self._stall_timeout_seconds - time.monotonic(), 0.0)

    def interrupt(self, error: TransferError) -> None:
        """Makes `check` raise `error`; the first one counts. From any thread."""
        self._error = self._error or error

    @property
    def interrupted(self) -> bool:
        """Whether `check` raises what interrupted it."""
        return self._error is not None

    def check(self) -> None:
        """Raises what interrupted it, or TransferStalled when there is no news for too long."""
        if self._error is not None:
            raise self._error
        if self.chunks and not self.seconds_left:
            raise TransferStalled(
                f"{self._silence} chunks {sorted(self.chunks)[:_NAMED_CHUNKS]} for "
                f"{time.monotonic() - self._news_at:.1f} s"
            )

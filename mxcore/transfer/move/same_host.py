"""Chunks read out of the holder's memory by cross-memory attach: on one host, without an agent on either side.

UCX could do it too. Our own reads cost nothing per tensor (one system call reads many stretches), hash each piece while
it is in the core's cache, use several cores, and nothing arrives once they return: there is nothing to fence.
"""

from __future__ import annotations

import errno
import os
from array import array
from collections.abc import Iterator, Sequence

from mxcore.errors import FenceFailed, NotOneSided, PeerLost, TransferError
from mxcore.process import AttachedReads
from mxcore.transfer.layout import Chunks
from mxcore.transfer.move.movers import Arrived, Awaited
from mxserver.wire.calls import Closing

__all__ = ["SameHostMover", "threads_of"]

_CLOSE_SECONDS = 30.0
_MOST_THREADS = 4  # more gain little: four come near the bandwidth of the memory


def threads_of(cores: int, *, hashed: bool) -> int:
    """How many threads read: as many as there are cores, at most 4 (with more, memory is what is waited for).

    Hashing takes an eighth of a thread's time (a quarter with AVX2 alone): where a core is free for it, one more.
    """
    threads = min(cores, _MOST_THREADS)
    return threads + 1 if hashed and cores > threads else threads


class SameHostMover(Closing):
    """Reads the memory of process `process` of this host, which worker `holder` has proven to be its own. See Mover.

    With `hashed`, digests are made on the way. Threads (`threads_of`) read until `close`, which waits for the chunks
    that are being read.
    """

    def __init__(
        self,
        holder: str,
        process: int,
        chunks: Chunks,
        local: array[int],
        remote: array[int],
        *,
        hashed: bool,
        stall_timeout_seconds: float,
    ) -> None:
        """Raises OSError when no thread can be started."""
        self._holder = holder
        self._process = process
        self._chunks = chunks
        self._local = local
        self._remote = remote
        threads = threads_of(len(os.sched_getaffinity(0)), hashed=hashed)
        self._reads = AttachedReads(process, threads=threads, hashed=hashed)
        self._awaited = Awaited(f"reading the memory of worker {holder} brought none of", stall_timeout_seconds)

    def close(self) -> None:
        """Drops what was not begun, waits for the rest: afterwards nothing is written here any more. Idempotent.

        Raises FenceFailed when the kernel does not return from a read.
        """
        if not self._reads.close(_CLOSE_SECONDS):
            raise FenceFailed(
                f"reading process {self._process} of worker {self._holder} has not ended after {_CLOSE_SECONDS:g} s: "
                "the memory that it reads into is given up"
            )

    def interrupt(self, error: TransferError) -> None:
        """See Mover."""
        self._awaited.interrupt(error)
        self.wake()

    def wake(self) -> None:
        """See Mover."""
        self._reads.wake()

    @property
    def idle(self) -> bool:
        """See Mover."""
        return not self._awaited.chunks

    def ask(self, chunks: Sequence[int]) -> None:
        """See Mover."""
        self._awaited.add(chunks)
        for chunk in chunks:
            self._reads.ask(
                chunk,
                *(self._chunks.slice_of(values, chunk) for values in (self._local, self._remote, self._chunks.lengths)),
            )

    def arrived(self) -> Iterator[Arrived]:
        """See Mover. Raises NotOneSided where the memory may not be read any more."""
        for chunk, error, digest in self._reads.ended(self._awaited.seconds_left):
            if error:
                raise self._as_error(chunk, error)
            self._awaited.remove(chunk)
            yield Arrived(chunk, digest or None)
        self._awaited.check()

    def _as_error(self, chunk: int, error: int) -> TransferError:
        text = f"reading chunk {chunk} from process {self._process} of worker {self._holder}: {os.strerror(error)}"
        return NotOneSided(text) if error == errno.EPERM else PeerLost(text)

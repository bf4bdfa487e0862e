"""Chunks read out of the holder's memory by cross-memory attach: on one host, without an agent of either side.

UCX could do it too. Our own reads cost nothing a tensor (many stretches are one call of the kernel), hash each piece
while it is in the core's cache, use several cores, and are over when they return: there is nothing to fence.
"""

from __future__ import annotations

import errno
import os
from array import array
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Self

from mxcore.errors import NotOneSided, PeerLost, TransferError
from mxcore.process.attached_memory import AttachedReads
from mxcore.transfer.layout.chunks import Chunks
from mxcore.transfer.move.movers import LeaseKeeper
from mxcore.transfer.move.source_client import SourceClient

__all__ = ["PullByAttach", "threads_of"]

_MOST_THREADS = 4  # more bring little: each is bound by a core's way to memory, together by the memory's


def threads_of(cores: int, asked_for: int, *, hashed: bool) -> int:
    """How many threads read; `asked_for` 0: as many as there are cores, at most 4.

    Hashing takes an eighth of a thread's time (a quarter with AVX2 alone): where a core is free for it, one more.
    """
    threads = asked_for or min(cores, _MOST_THREADS)
    return threads + 1 if hashed and cores > threads else threads


class PullByAttach:
    """Reads from process `process` of this host, which the holder has proven to be its own and readable.

    With `hashed`, `digest_of` has the XXH3-64 of what arrived. `threads` as for `threads_of`. Used by one thread; the
    reads run on others until the context ends.
    """

    needs_this_thread = False  # the readers go on

    def __init__(
        self,
        client: SourceClient,
        lease_id: str,
        process: int,
        chunks: Chunks,
        local: array[int],
        remote: array[int],
        *,
        hashed: bool,
        threads: int = 0,
    ) -> None:
        """Raises OSError when no thread can be started."""
        self._lease = LeaseKeeper(client, lease_id)
        self._holder = client.source.worker_id
        self._process = process
        self._chunks = chunks
        self._local = local
        self._remote = remote
        threads = threads_of(len(os.sched_getaffinity(0)), threads, hashed=hashed)
        self._reads = AttachedReads(process, threads=threads, hashed=hashed)
        self._expected = 0
        self._digests: dict[int, bytes] = {}

    def __enter__(self) -> Self:
        self._lease.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._reads.close()  # afterwards nothing is written here any more
        self._lease.__exit__(kind, error, trace)

    @property
    def idle(self) -> bool:
        """Whether everything that was asked for has arrived."""
        return self._expected == 0

    def ask(self, chunks: Sequence[int]) -> None:
        """Adds chunks to what is fetched."""
        for chunk in chunks:
            self._reads.ask(
                chunk,
                *(self._chunks.slice_of(values, chunk) for values in (self._local, self._remote, self._chunks.lengths)),
            )
            self._expected += 1

    def arrived(self) -> Iterator[int]:
        """Waits for a read; yields chunks whose bytes are there. Raises PeerLost, NotOneSided, SourceRefused."""
        self._lease.check()
        for chunk, error, digest in self._reads.ended():
            self._expected -= 1
            if error:
                raise self._as_error(chunk, error)
            self._digests[chunk] = digest
            yield chunk

    def digest_of(self, chunk: int) -> bytes:
        """The digest of a chunk that has arrived, once; empty if none was made."""
        return self._digests.pop(chunk, b"")

    def _as_error(self, chunk: int, error: int) -> TransferError:
        text = f"reading chunk {chunk} from process {self._process} of worker {self._holder}: {os.strerror(error)}"
        return NotOneSided(text) if error == errno.EPERM else PeerLost(text)

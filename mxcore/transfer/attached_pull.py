"""Chunks read out of the holder's memory by cross-memory attach: on one host, without an agent of either side.

UCX could do it too. Our own reads cost nothing a tensor (many stretches are one call of the kernel), hash each piece
while it is in the core's cache, use several cores, and are over when they return: there is nothing to fence.
"""

from __future__ import annotations

import errno
import os
import queue
from array import array
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Self, TypeAlias

from mxcore.attached_memory import read_attached
from mxcore.errors import NotOneSided, PeerLost, TransferError
from mxcore.transfer.chunks import Chunks
from mxcore.transfer.movers import LeaseKeeper
from mxcore.transfer.source_client import SourceClient

__all__ = ["READERS", "PullByAttach"]

READERS = min(4, len(os.sched_getaffinity(0)))  # threads a holder; each is bound by a core's way to memory

_Results: TypeAlias = "queue.SimpleQueue[tuple[int, bytes] | Exception]"


class PullByAttach:
    """Reads from process `process` of this host, which the holder has proven to be its own and readable.

    With `hashed`, `digest_of` has the XXH3-64 of what arrived. Used by one thread; the reads run on `READERS` others
    until the context ends.
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
    ) -> None:
        self._lease = LeaseKeeper(client, lease_id)
        self._holder = client.source.worker_id
        self._process = process
        self._chunks = chunks
        self._local = local
        self._remote = remote
        self._hashed = hashed
        self._pool = ThreadPoolExecutor(READERS, thread_name_prefix="mx-attached-read")
        self._results: _Results = queue.SimpleQueue()
        self._expected = 0
        self._digests: dict[int, bytes] = {}

    def __enter__(self) -> Self:
        self._lease.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)  # afterwards nothing is written here any more
        self._lease.__exit__(kind, error, trace)

    @property
    def idle(self) -> bool:
        """Whether everything that was asked for has arrived."""
        return self._expected == 0

    def ask(self, chunks: Sequence[int]) -> None:
        """Adds chunks to what is fetched."""
        for chunk in chunks:
            self._expected += 1
            self._pool.submit(self._read, chunk)

    def arrived(self) -> Iterator[int]:
        """Waits for a read; yields chunks whose bytes are there. Raises PeerLost, NotOneSided, SourceRefused."""
        self._lease.check()
        if self._expected:
            yield self._taken(self._results.get())
        while self._expected and not self._results.empty():
            yield self._taken(self._results.get())

    def digest_of(self, chunk: int) -> bytes:
        """The digest of a chunk that has arrived, once; empty if none was made."""
        return self._digests.pop(chunk, b"")

    def _read(self, chunk: int) -> None:
        """On a reader's thread."""
        local, remote, lengths = (
            self._chunks.slice_of(values, chunk) for values in (self._local, self._remote, self._chunks.lengths)
        )
        try:
            self._results.put((chunk, read_attached(self._process, local, remote, lengths, hashed=self._hashed)))
        except OSError as error:
            self._results.put(self._as_error(chunk, error))
        except Exception as error:  # noqa: BLE001 - raised by `arrived`, which would wait for this chunk for ever
            self._results.put(error)

    def _as_error(self, chunk: int, error: OSError) -> TransferError:
        text = f"reading chunk {chunk} from process {self._process} of worker {self._holder}: {error.strerror}"
        return NotOneSided(text) if error.errno == errno.EPERM else PeerLost(text)

    def _taken(self, result: tuple[int, bytes] | Exception) -> int:
        self._expected -= 1
        if isinstance(result, Exception):
            raise result
        chunk, digest = result
        self._digests[chunk] = digest
        return chunk

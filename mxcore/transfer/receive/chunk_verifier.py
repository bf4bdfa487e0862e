"""Chunks of one holder are compared with their digests while others arrive."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from mxcore.errors import DigestMismatch
from mxcore.metrics import CHUNKS_VERIFIED, RECEIVED_BYTES, WRONG_CHUNKS
from mxcore.transfer.receive.received_chunks import ReceivedChunks

__all__ = ["ChunkVerifier"]

logger = logging.getLogger(__name__)

_VERIFY_THREADS = 1


class ChunkVerifier:
    """Compares chunks with their digests while others arrive, and records those that are right."""

    def __init__(self, received: ReceivedChunks, holder: str, transport: str, doubt: Callable[[int], None]) -> None:
        """`doubt` is called for each wrong chunk, on any thread; `transport` is how they come, for the metrics."""
        self._received = received
        self._holder = holder
        self._transport = transport
        self._doubt = doubt
        self._pool = ThreadPoolExecutor(_VERIFY_THREADS, thread_name_prefix="mx-verify")
        self._running: set[Future[None]] = set()

    def submit(self, chunk: int, digest: bytes | None, then: Callable[[], None]) -> None:
        """Takes a chunk that has arrived, with its digest if there is one; then it may raise DigestMismatch.

        The holder's first wrong chunk is missing again, the second one raises. Without a digest, `then` is called
        once the chunk is verified or refused.
        """
        if digest is not None:
            self._record(chunk, self._received.verify(chunk, digest))
            return
        running = self._pool.submit(self._verify, chunk)
        self._running.add(running)
        running.add_done_callback(lambda _: then())

    def collect(self, *, wait: bool) -> None:
        """Raises what verifying raised (DigestMismatch); with `wait`, after all chunks are verified."""
        for running in [running for running in self._running if wait or running.done()]:
            self._running.remove(running)
            running.result()

    def _verify(self, chunk: int) -> None:
        self._record(chunk, self._received.verify(chunk))

    def _record(self, chunk: int, right: bool) -> None:
        if right:
            self._received.accept(self._holder, chunk)
            CHUNKS_VERIFIED.add()
            RECEIVED_BYTES.add("p2p", self._transport, amount=self._received.chunks.bytes_of(chunk))
            return
        WRONG_CHUNKS.add()
        self._doubt(chunk)
        message = f"chunk {chunk} from worker {self._holder} is not what its digest promises; it is refused"
        if not self._received.refuse(self._holder, chunk):
            raise DigestMismatch(f"{message}, and is not the first one")
        logger.warning("%s and asked for once more", message)

    def close(self) -> None:
        """Waits for the verification that runs: nothing reads the memory afterwards."""
        self._pool.shutdown(wait=True, cancel_futures=True)

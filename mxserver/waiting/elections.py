"""Which worker reads storage for which others: turns of the store, or of this server where the store is its own."""

from __future__ import annotations

import heapq
import logging
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from mxserver.store import LEASE_SECONDS, MemoryTurns, SystemClock, Turn, Turns
from mxserver.wire.proto import mx_pb2

__all__ = ["ElectionKey", "StorageElections"]

_LOG = logging.getLogger(__name__)

_SHORTEST_RETRY_SECONDS = 0.25
_RETRY_SECONDS_A_WAITER = 0.005  # 200 questions a second in all, however many wait
_LONGEST_RETRY_SECONDS = 5.0


class ElectionKey(NamedTuple):
    """The workers that one reader serves: all with these weights and this rank, where they may share them."""

    source_id: str
    worker_rank: int
    domain: str = ""

    def __str__(self) -> str:
        return f"{self.worker_rank}:{len(self.source_id)}:{self.source_id}{self.domain}"


class StorageElections:
    """Who reads storage, and how often those ask who wait and are told nothing. Thread-safe.

    All calls raise StoreUnavailable.
    """

    def __init__(self, turns: Turns | None = None, now: Callable[[], float] = time.monotonic) -> None:
        """`turns`: the store's; None: of this object alone."""
        self._turns = turns or MemoryTurns(SystemClock())
        self._now = now
        self._lock = threading.Lock()
        self._asking: dict[ElectionKey, dict[str, float]] = {}  # who asks, and until when that counts
        self._ends: list[tuple[float, ElectionKey, str]] = []  # a heap of these times, which may have been extended

    def take(
        self, key: ElectionKey, worker_id: str, epoch: int, others_were_starting: Callable[[], bool]
    ) -> mx_pb2.TakeStorageTurnResponse:
        """Elects this worker, extends its lease (if it passes the lease's epoch), or tells it to wait."""
        turn = self._turns.take(str(key), worker_id, epoch, lambda: not others_were_starting())
        if turn.everybody:
            return mx_pb2.TakeStorageTurnResponse(turn=mx_pb2.STORAGE_TURN_EVERYBODY)
        if not turn.is_taken:
            return self._wait(key, worker_id, turn)
        if not epoch:
            _LOG.info("storage reader elected source=%s rank=%d domain=%r worker=%s epoch=%d", *key, *turn[:2])
        return mx_pb2.TakeStorageTurnResponse(
            turn=mx_pb2.STORAGE_TURN_YOURS,
            epoch=turn.epoch,
            lease_ms=round(LEASE_SECONDS * 1000),
            reader_worker_id=worker_id,
        )

    def end(self, key: ElectionKey, worker_id: str, epoch: int, *, shared: bool) -> bool:
        """Ends a reader's lease. Returns False if the worker no longer holds it."""
        ended = self._turns.end(str(key), worker_id, epoch, everybody=not shared)
        if ended:
            _LOG.info("storage reader done source=%s rank=%d domain=%r worker=%s shared=%s", *key, worker_id, shared)
        return ended

    def state(self, key: ElectionKey) -> tuple[str, bool]:
        """Who reads, empty if nobody does; and whether everybody has to."""
        turn = self._turns.now(str(key))
        return turn.worker_id, turn.everybody

    def _wait(self, key: ElectionKey, worker_id: str, turn: Turn) -> mx_pb2.TakeStorageTurnResponse:
        with self._lock:
            now = self._now()
            self._forget(now)
            asking = self._asking.setdefault(key, {})
            asking[worker_id] = now + 2 * _LONGEST_RETRY_SECONDS
            heapq.heappush(self._ends, (asking[worker_id], key, worker_id))
            retry = min(_LONGEST_RETRY_SECONDS, max(_SHORTEST_RETRY_SECONDS, len(asking) * _RETRY_SECONDS_A_WAITER))
        return mx_pb2.TakeStorageTurnResponse(
            turn=mx_pb2.STORAGE_TURN_WAIT, retry_ms=round(retry * 1000), reader_worker_id=turn.worker_id
        )

    def _forget(self, now: float) -> None:
        """Called with the lock."""
        while self._ends and self._ends[0][0] < now:
            _, key, worker_id = heapq.heappop(self._ends)
            asking = self._asking.get(key, {})
            if asking.get(worker_id, now) < now:
                del asking[worker_id]
                if not asking:
                    del self._asking[key]

"""Which worker reads storage for which others.

Elections are leases in this process' memory, so a restart of the server forgets them. For the length of one lease
after a restart, a reader is elected only where no worker was starting before; a living reader extends its lease.
"""

from __future__ import annotations

import heapq
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from mxserver.store import Clock, SystemClock
from mxserver.wire.proto import mx_pb2

__all__ = ["ElectionKey", "StorageElections"]

_LOG = logging.getLogger(__name__)

LEASE_SECONDS = 6.0
EVERYBODY_SECONDS = 60.0
_SHORTEST_RETRY_SECONDS = 0.25
_RETRY_SECONDS_A_WAITER = 0.005  # 200 questions a second in all, however many wait
_LONGEST_RETRY_SECONDS = 5.0


class ElectionKey(NamedTuple):
    """The workers that one reader serves: all with these weights and this rank, where they may share them."""

    source_id: str
    worker_rank: int
    domain: str = ""


@dataclass
class _Reader:
    worker_id: str
    epoch: int
    until: float  # monotonic seconds


class StorageElections:
    """Which worker reads storage for which others. Thread-safe."""

    def __init__(self, clock: Clock | None = None) -> None:
        self._clock = clock or SystemClock()
        self._lock = threading.Lock()
        self._started = self._clock.monotonic_seconds()
        self._epoch = self._clock.unix_ms()
        self._readers: dict[ElectionKey, _Reader] = {}
        self._everybody: dict[ElectionKey, float] = {}
        self._waiting: dict[ElectionKey, dict[str, float]] = {}
        self._ends: list[tuple[float, ElectionKey, str]] = []  # a heap of what ends when, and may have been extended

    def take(
        self, key: ElectionKey, worker_id: str, epoch: int, others_were_starting: Callable[[], bool]
    ) -> mx_pb2.TakeStorageTurnResponse:
        """Elects this worker, extends its lease (if it passes the lease's epoch), or tells it to wait."""
        with self._lock:
            now = self._clock.monotonic_seconds()
            self._forget(now)
            if self._everybody.get(key, now) > now:
                return mx_pb2.TakeStorageTurnResponse(turn=mx_pb2.STORAGE_TURN_EVERYBODY)
            reader = self._readers.get(key)
            if reader is not None and (reader.worker_id != worker_id or epoch not in (0, reader.epoch)):
                return self._wait(key, worker_id, reader.worker_id, now)
            settling = now < self._started + LEASE_SECONDS
            if reader is None and not epoch and settling and others_were_starting():
                return self._wait(key, worker_id, "", now)
            if reader is None:
                self._epoch += 1
                reader = self._readers[key] = _Reader(worker_id, max(epoch, self._epoch), now)
                _LOG.info(
                    "storage reader elected source=%s rank=%d domain=%r worker=%s epoch=%d",
                    *key,
                    worker_id,
                    reader.epoch,
                )
            reader.until = now + LEASE_SECONDS
            self._ends_at(reader.until, key)
            if worker_id in (waiting := self._waiting.get(key, {})):
                del waiting[worker_id]
                if not waiting:
                    del self._waiting[key]
            return mx_pb2.TakeStorageTurnResponse(
                turn=mx_pb2.STORAGE_TURN_YOURS,
                epoch=reader.epoch,
                lease_ms=round(LEASE_SECONDS * 1000),
                reader_worker_id=worker_id,
            )

    def end(self, key: ElectionKey, worker_id: str, epoch: int, *, shared: bool) -> bool:
        """Ends a reader's lease. Returns False if the worker no longer holds it."""
        with self._lock:
            reader = self._readers.get(key)
            if reader is None or (reader.worker_id, reader.epoch) != (worker_id, epoch):
                return False
            del self._readers[key]
            if not shared:
                self._everybody[key] = self._clock.monotonic_seconds() + EVERYBODY_SECONDS
                self._ends_at(self._everybody[key], key)
        _LOG.info("storage reader done source=%s rank=%d domain=%r worker=%s shared=%s", *key, worker_id, shared)
        return True

    def state(self, key: ElectionKey) -> tuple[str, bool]:
        """Who reads, empty if nobody does; and whether everybody has to."""
        with self._lock:
            now = self._clock.monotonic_seconds()
            self._forget(now)
            reader = self._readers.get(key)
            return reader.worker_id if reader is not None else "", self._everybody.get(key, now) > now

    def _wait(self, key: ElectionKey, worker_id: str, reader: str, now: float) -> mx_pb2.TakeStorageTurnResponse:
        waiting = self._waiting.setdefault(key, {})
        waiting[worker_id] = now + 2 * _LONGEST_RETRY_SECONDS
        self._ends_at(waiting[worker_id], key, worker_id)
        retry = min(_LONGEST_RETRY_SECONDS, max(_SHORTEST_RETRY_SECONDS, len(waiting) * _RETRY_SECONDS_A_WAITER))
        return mx_pb2.TakeStorageTurnResponse(
            turn=mx_pb2.STORAGE_TURN_WAIT, retry_ms=round(retry * 1000), reader_worker_id=reader
        )

    def _ends_at(self, until: float, key: ElectionKey, worker_id: str = "") -> None:
        heapq.heappush(self._ends, (until, key, worker_id))

    def _forget(self, now: float) -> None:
        while self._ends and self._ends[0][0] < now:
            _, key, worker_id = heapq.heappop(self._ends)
            waiting = self._waiting.get(key, {})
            if waiting.get(worker_id, now) < now:
                del waiting[worker_id]
                if not waiting:
                    del self._waiting[key]
            reader = self._readers.get(key)
            if reader is not None and reader.until < now:
                del self._readers[key]
                _LOG.warning("storage reader lost source=%s rank=%d domain=%r worker=%s", *key, reader.worker_id)
            if self._everybody.get(key, now) < now:
                del self._everybody[key]

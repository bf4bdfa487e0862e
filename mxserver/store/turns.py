"""Turns: of the workers that name one key, one has it, under a lease with an epoch that grows: it reads storage.

A turn that ended with `everybody` is nobody's for a while: each worker acts for itself.
"""

from __future__ import annotations

import heapq
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from mxserver.store.clock import Clock

__all__ = ["MemoryTurns", "Turn", "Turns"]

LEASE_SECONDS = 6.0
EVERYBODY_SECONDS = 60.0


class Turn(NamedTuple):
    """Who has it; nobody without a `worker_id`. `is_taken`: the one that asked has it now."""

    worker_id: str = ""
    epoch: int = 0
    everybody: bool = False
    is_taken: bool = False


class Turns(ABC):
    """Thread-safe. All calls raise StoreUnavailable while the store does not work."""

    @abstractmethod
    def take(self, key: str, worker_id: str, epoch: int, may_begin: Callable[[], bool]) -> Turn:
        """Whose turn it is now: the worker's, if nobody else has it, or it names its epoch. With 0 it wants a new one.

        `may_begin` is asked before a turn is given that an earlier life of a forgetful store may have given too.
        """

    @abstractmethod
    def end(self, key: str, worker_id: str, epoch: int, *, everybody: bool) -> bool:
        """Ends it. False if the worker no longer has it."""

    @abstractmethod
    def now(self, key: str) -> Turn:
        """Whose turn it is."""


@dataclass
class _Held:
    turn: Turn
    until: float  # monotonic seconds


class MemoryTurns(Turns):
    """In this process' memory, so that a restart forgets them: for one lease after it, `may_begin` decides."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._started = clock.monotonic_seconds()
        self._epoch = clock.unix_ms()
        self._held: dict[str, _Held] = {}
        self._ends: list[tuple[float, str]] = []  # a heap of what ends when, and may have been extended

    def take(self, key: str, worker_id: str, epoch: int, may_begin: Callable[[], bool]) -> Turn:
        settling = self._clock.monotonic_seconds() < self._started + LEASE_SECONDS
        may = epoch or not settling or may_begin()  # which may take long: not under the lock
        with self._lock:
            now = self._clock.monotonic_seconds()
            turn = self._now(key, now)
            if turn.everybody or (turn.worker_id and (turn.worker_id != worker_id or epoch not in (0, turn.epoch))):
                return turn
            if not turn.worker_id:
                if not may:
                    return turn
                self._epoch += 1
                turn = Turn(worker_id, max(epoch, self._epoch))
            self._keep(key, turn, now + LEASE_SECONDS)
            return turn._replace(is_taken=True)

    def end(self, key: str, worker_id: str, epoch: int, *, everybody: bool) -> bool:
        with self._lock:
            now = self._clock.monotonic_seconds()
            if self._now(key, now)[:2] != (worker_id, epoch):
                return False
            del self._held[key]
            if everybody:
                self._keep(key, Turn(everybody=True), now + EVERYBODY_SECONDS)
            return True

    def now(self, key: str) -> Turn:
        with self._lock:
            return self._now(key, self._clock.monotonic_seconds())

    def _keep(self, key: str, turn: Turn, until: float) -> None:
        self._held[key] = _Held(turn, until)
        heapq.heappush(self._ends, (until, key))

    def _now(self, key: str, now: float) -> Turn:
        while self._ends and self._ends[0][0] < now:
            _, ended = heapq.heappop(self._ends)
            if ended in self._held and self._held[ended].until < now:
                del self._held[ended]
        held = self._held.get(key)
        return held.turn if held is not None else Turn()

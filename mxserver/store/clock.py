"""The two clocks of the server: one to judge leases by, one to stamp records with."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

_LOG = logging.getLogger(__name__)

LONGEST_GAP_SECONDS = 3.0
MOST_GAPS = 10


class Clock(Protocol):
    """A store's source of time. Tests pass one that they set themselves."""

    def monotonic_seconds(self) -> float:
        """Seconds since any fixed moment; never goes back. Leases are judged by it."""

    def unix_ms(self) -> int:
        """Milliseconds since 1970; may jump. Only shown to clients."""


class SystemClock:
    """The machine's clocks."""

    def monotonic_seconds(self) -> float:
        return time.monotonic()

    def unix_ms(self) -> int:
        return time.time_ns() // 1_000_000


class HeardClock(SystemClock):
    """Leases' time passes while heartbeats can be heard, and stands still otherwise. Thread-safe.

    `heard` says that one was heard just now. Without it, time passes for `LONGEST_GAP_SECONDS` more, or half a lease if
    that is shorter; what comes after that, until the next one, counts against nobody: the process was stopped, the
    machine suspended, or its threads had no time. Of such gaps, MOST_GAPS within the time of one lease are left out, so
    that a server which is always too slow does not keep dead workers for ever.
    """

    def __init__(self, lease_seconds: float, real_seconds: Callable[[], float] = time.monotonic) -> None:
        self._real_seconds = real_seconds
        self._lease_seconds = lease_seconds
        self._most_seconds = min(LONGEST_GAP_SECONDS, lease_seconds / 2)
        self._lock = threading.Lock()
        self._heard_at = self._counted_to = real_seconds()
        self._now = 0.0
        self._gaps: deque[float] = deque(maxlen=MOST_GAPS)  # when they were, by this clock

    def monotonic_seconds(self) -> float:
        with self._lock:
            return self._count()

    def heard(self) -> None:
        """A heartbeat could be heard just now."""
        with self._lock:
            now, real = self._count(), self._real_seconds()
            gap = real - self._counted_to
            if gap > 0:
                is_one_too_many = len(self._gaps) == MOST_GAPS and now - self._gaps[0] < self._lease_seconds
                if is_one_too_many:
                    self._now += gap
                else:
                    self._gaps.append(now)
                self._counted_to = real
            self._heard_at = real
        if gap > self._most_seconds:
            _LOG.warning("was stopped seconds=%.1f; leases are extended by that time=%s", gap, not is_one_too_many)

    def _count(self) -> float:
        until = min(self._real_seconds(), self._heard_at + self._most_seconds)
        if until > self._counted_to:
            self._now += until - self._counted_to
            self._counted_to = until
        return self._now

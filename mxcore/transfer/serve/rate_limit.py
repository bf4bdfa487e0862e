"""A limit on what a holder grants, so that its engine keeps serving its users."""

from __future__ import annotations

import time
from collections.abc import Callable

__all__ = ["RateLimit"]

_BURST_SECONDS = 0.25


class RateLimit:
    """A token bucket over bytes; 0 bytes a second is no limit. Not thread-safe.

    It holds a quarter of a second's bytes, at least `burst_bytes` (one unit of what is asked for).
    """

    def __init__(
        self, bytes_per_second: float, *, burst_bytes: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._bytes_per_second = bytes_per_second
        self._most = max(float(burst_bytes), bytes_per_second * _BURST_SECONDS)
        self._clock = clock
        self._bytes = self._most
        self._at = clock()

    def allowed(self, count: int, unit_bytes: int) -> tuple[int, float]:
        """Takes up to `count` units out of the bucket; returns how many, and if none the seconds until the next one."""
        if not self._bytes_per_second:
            return count, 0.0
        now = self._clock()
        self._bytes = min(self._most, self._bytes + (now - self._at) * self._bytes_per_second)
        self._at = now
        units = min(count, int(self._bytes // unit_bytes))
        self._bytes -= units * unit_bytes
        return units, 0.0 if units or not count else (unit_bytes - self._bytes) / self._bytes_per_second

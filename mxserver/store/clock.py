"""The two clocks of the server: one to judge leases by, one to stamp records with."""

from __future__ import annotations

import time
from typing import Protocol


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

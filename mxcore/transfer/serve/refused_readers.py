"""Readers that a full holder turned away, and when each of them is to ask again."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict

__all__ = ["RefusedReaders"]

SHORTEST_SECONDS, LONGEST_SECONDS = 0.5, 30.0
SECONDS_A_READER = 0.1  # so that they ask ten times a second, however many they are
_MOST_KNOWN = 4096


class RefusedReaders:
    """Thread-safe. A reader counts until it has not asked for as long as anybody is told to wait."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._refused: OrderedDict[str, float] = OrderedDict()  # connection -> when (monotonic), the first one first

    def again_seconds(self, connection: str) -> float:
        """When this one is to ask again: the later, the more ask."""
        with self._lock:
            now = time.monotonic()
            self._refused[connection] = now
            self._refused.move_to_end(connection)
            while len(self._refused) > _MOST_KNOWN or next(iter(self._refused.values())) < now - LONGEST_SECONDS:
                self._refused.popitem(last=False)
            return min(LONGEST_SECONDS, max(SHORTEST_SECONDS, SECONDS_A_READER * len(self._refused)))

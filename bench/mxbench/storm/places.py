"""Who may receive in a simulated fleet: holders have so many places; whoever finds none is told when to come back."""

from __future__ import annotations

import threading
from typing import Literal

from mxcore.transfer.serve.refused_readers import RefusedReaders

__all__ = ["OF_A_HOLDER", "OF_A_RECEIVER", "Moment", "Places"]

OF_A_HOLDER = 8
OF_A_RECEIVER = 2  # that are left of its eight, as it takes others' too


class Places:
    """Those of one rank's holders together. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free = 0
        self._refused = RefusedReaders()
        self.refusals = 0

    def take(self, reader: str) -> float:
        """0: this reader has a place; else it was refused, and is to ask again after so many seconds."""
        with self._lock:
            if self._free > 0:
                self._free -= 1
                return 0.0
            self.refusals += 1
        return self._refused.again_seconds(reader)

    def give(self, count: int) -> None:
        """So many more: a holder came, or a reader left."""
        with self._lock:
            self._free += count


Moment = Literal["waiting", "receiving", "serving", ""]
"""When a simulated worker dies; empty: never."""

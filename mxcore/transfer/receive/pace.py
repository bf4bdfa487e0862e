"""How fast bytes come: a time-out ends what has come to rest, never what still arrives."""

from __future__ import annotations

from collections import deque

__all__ = ["MEGABYTE", "Pace"]

MEGABYTE = 1_000_000
_WINDOW_SECONDS = 10.0
_STEP_SECONDS = 0.5


class Pace:
    """The rate of the last seconds. Used by one thread."""

    def __init__(self) -> None:
        self._looks: deque[tuple[float, int]] = deque()  # moment (monotonic), bytes so far

    def bytes_per_second(self, now: float, done_bytes: int) -> float:
        """The mean since the first look, or of the last ten seconds; at the first look whatever has come counts as
        enough if it is a megabyte. Bytes that are missing again count as none.
        """
        if not self._looks:
            self._looks.append((now, 0))
        began, before = self._looks[0]
        if now - self._looks[-1][0] >= _STEP_SECONDS:
            self._looks.append((now, done_bytes))
        while len(self._looks) > 2 and now - self._looks[1][0] >= _WINDOW_SECONDS:
            self._looks.popleft()
        return max(0, done_bytes - before) / max(now - began, 1.0)

"""Retries while a server does not answer: how often, and for how long."""

from __future__ import annotations

import random
import threading
import time

FIRST_WAIT_SECONDS = 0.1
LONGEST_WAIT_SECONDS = 2.0


class Patience:
    """Waits between attempts. Each wait doubles, less a random part, so that clients that lost a server together do not
    return together. Not thread-safe. `stop`, if given, ends waits early.

    Retry libraries count attempts; here the time without any answer from the server ends them.
    """

    def __init__(self, seconds: float, stop: threading.Event | None = None) -> None:
        """`seconds`: how long the server may be silent."""
        self._seconds = seconds
        self._stop = stop or threading.Event()
        self._heard_at = time.monotonic()
        self._attempts = 0

    def heard(self) -> None:
        """The server answered: the time starts again."""
        self._heard_at = time.monotonic()
        self._attempts = 0

    def wait(self) -> bool:
        """Waits for the next attempt. Returns False at once if the server was silent for too long, or `stop` is set."""
        left = self._heard_at + self._seconds - time.monotonic()
        if left <= 0:
            return False
        wait = min(FIRST_WAIT_SECONDS * 2.0**self._attempts, LONGEST_WAIT_SECONDS) * random.uniform(0.5, 1.0)  # noqa: S311
        self._attempts = min(self._attempts + 1, 10)
        return not self._stop.wait(min(wait, left))

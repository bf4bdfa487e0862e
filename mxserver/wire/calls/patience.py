"""How long, and how often, a server that is away is asked again."""

from __future__ import annotations

import random
import threading
import time

FIRST_WAIT_SECONDS = 0.1
LONGEST_WAIT_SECONDS = 2.0


class Patience:
    """Waits between attempts: doubled each time, each a random part shorter, so that clients that lost a server at
    the same moment do not come back at the same moment. Not thread-safe; `stop`, where given, ends waits early.

    Of the retry libraries none is needed for this: what ends the attempts here is how long nothing was heard.
    """

    def __init__(self, seconds: float, stop: threading.Event | None = None) -> None:
        """`seconds`: how long the server may be away without a break."""
        self._seconds = seconds
        self._stop = stop or threading.Event()
        self._heard_at = time.monotonic()
        self._attempts = 0

    def heard(self) -> None:
        """The server gave a sign of life."""
        self._heard_at = time.monotonic()
        self._attempts = 0

    def wait(self) -> bool:
        """Waits for the next attempt. False, at once: the server has been away for too long, or `stop` is set."""
        left = self._heard_at + self._seconds - time.monotonic()
        if left <= 0:
            return False
        wait = min(FIRST_WAIT_SECONDS * 2.0**self._attempts, LONGEST_WAIT_SECONDS) * random.uniform(0.5, 1.0)  # noqa: S311
        self._attempts = min(self._attempts + 1, 10)
        return not self._stop.wait(min(wait, left))

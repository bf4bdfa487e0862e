"""A thread that sends heartbeats at an interval, and more often while they fail."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from mxserver.wire import WireError

__all__ = ["Heartbeat"]

logger = logging.getLogger(__name__)

_FIRST_RETRY_SECONDS = 1.0
_LEASE_FRACTION = 3  # renewed at a third of the lease: two heartbeats may fail


class Heartbeat:
    """Calls `beat` on a daemon thread of its own; thread-safe.

    `beat` raises WireError when it fails; it is then repeated after 1, 2, 4 ... seconds, at most the interval. The
    first of several failures and their end are logged.
    """

    def __init__(self, interval_seconds: float, beat: Callable[[], None]) -> None:
        self._interval_seconds = interval_seconds
        self._beat = beat
        self._stop = threading.Event()
        self._woken = threading.Event()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    @property
    def interval_seconds(self) -> float:
        """The time between two heartbeats that succeed."""
        return self._interval_seconds

    def limit(self, lease_seconds: float) -> None:
        """Shortens the interval to a third of the server's lease; 0: the server has told none."""
        if lease_seconds > 0:
            self._interval_seconds = min(self._interval_seconds, lease_seconds / _LEASE_FRACTION)

    def start(self, *, soon: bool = False) -> None:
        """Starts the thread, with the first beat after an interval or `soon`; idempotent, nothing after `stop`."""
        with self._lock:
            if self._thread is None and not self._stop.is_set():
                self._thread = threading.Thread(target=self._run, args=(soon,), name="mx-heartbeat", daemon=True)
                self._thread.start()

    def soon(self) -> None:
        """The next beat is now, unless one is running."""
        self._woken.set()

    def stop(self) -> None:
        """Ends it and waits for a heartbeat that is running, except on the thread itself. Idempotent."""
        self._stop.set()
        self._woken.set()
        with self._lock:
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def _run(self, soon: bool) -> None:
        retry_seconds = _FIRST_RETRY_SECONDS
        failing = False
        pause = min(retry_seconds, self._interval_seconds) if soon else self._interval_seconds
        while not self._stops_after(pause):
            try:
                self._beat()
            except WireError as error:
                if not failing:
                    logger.warning("heartbeat did not get through, trying again: %s", error)
                failing = True
                pause = min(retry_seconds, self._interval_seconds)
                retry_seconds = min(2 * retry_seconds, self._interval_seconds)
            else:
                if failing:
                    logger.info("heartbeat gets through again")
                failing = False
                retry_seconds = _FIRST_RETRY_SECONDS
                pause = self._interval_seconds

    def _stops_after(self, pause: float) -> bool:
        self._woken.wait(pause)
        self._woken.clear()
        return self._stop.is_set()

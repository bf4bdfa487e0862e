"""Threads that do something again and again, and outlive its errors."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

_LOG = logging.getLogger(__name__)


class Periodic:
    """Calls `step` in a thread of its own, every so many seconds and soon after `wake`, until `stop`. Thread-safe.

    `step` takes at most `share` of the time: it rests after it has taken long.

    An error of `step` is logged and kept in `problem`, which readiness shows, until a later call works.
    """

    def __init__(self, name: str, seconds: float, step: Callable[[], None], *, share: float = 1.0) -> None:
        self._name, self._seconds, self._step, self._share = name, seconds, step, share
        self._stopping = threading.Event()
        self._woken = threading.Event()
        self._error = ""
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    @property
    def problem(self) -> str | None:
        """What keeps the work from being done; None if nothing does."""
        if self._thread.ident is not None and not self._thread.is_alive() and not self._stopping.is_set():
            return f"the thread {self._name} has ended"
        return f"the thread {self._name} fails: {self._error}" if self._error else None

    def start(self) -> None:
        """Call once."""
        self._thread.start()

    def stop(self) -> None:
        """Waits until the present call has ended. Idempotent."""
        self._stopping.set()
        self._woken.set()
        if self._thread.ident is not None:
            self._thread.join()

    def wake(self) -> None:
        """Has `step` called soon: one call for all that woke it before."""
        self._woken.set()

    def _run(self) -> None:
        rest = 0.0
        while not self._stopping.wait(rest):
            self._woken.wait(max(0.0, self._seconds - rest))
            self._woken.clear()
            if self._stopping.is_set():
                return
            began = time.monotonic()
            try:
                self._step()
            except Exception as error:  # noqa: BLE001 - whatever it is: the next call may work, and readiness tells of it
                if not self._error:
                    _LOG.exception("thread=%s failed", self._name)
                self._error = repr(error)
            else:
                self._error = ""
            rest = (time.monotonic() - began) * (1 / self._share - 1)

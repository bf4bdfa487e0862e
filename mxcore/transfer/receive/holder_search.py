"""The search for more holders while a receive runs."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Sequence
from typing import TypeAlias

from mxcore.transfer.move import Source
from mxcore.transfer.receive.change_log import RecentErrors

__all__ = ["FindMore", "HolderSearch"]

logger = logging.getLogger(__name__)

FindMore: TypeAlias = Callable[[], Sequence[Source] | None]
"""Other holders, as the server knows them; None: it was not asked anew. May raise WireError."""

_FIRST_FIND_SECONDS = 0.1  # workers that start together can be asked soon
_FIND_SECONDS = 1.0  # between two questions, unless there is something new,
_LEAST_FIND_SECONDS = 0.1  # and then


class HolderSearch:
    """Asks who else has weights, on a thread of its own, since the server may be slow. `start` and `stop` once."""

    def __init__(self, found: Callable[[Sequence[Source], float], None], chance: random.Random) -> None:
        """`found` takes what was answered, and when (monotonic) that was asked; `chance` scatters the questions."""
        self._found, self._chance = found, chance
        self._over, self._news = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None

    def look(self) -> None:
        """Something is new: it is asked soon. From any thread, at any time."""
        self._news.set()

    def start(self, find_more: FindMore) -> None:
        """Starts the thread."""
        self._thread = threading.Thread(target=self._run, args=(find_more,), name="mx-find", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Waits for the end of the thread."""
        self._over.set()
        self._news.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self, find_more: FindMore) -> None:
        pause = _FIRST_FIND_SECONDS
        errors = RecentErrors(logger, "sources cannot be listed")
        while True:
            self._news.wait(pause * (0.5 + self._chance.random()))
            self._news.clear()
            if self._over.is_set():
                return
            asked_at = time.monotonic()
            with errors:
                found = find_more()
                if found is not None:
                    self._found(found, asked_at)
            pause = min(2 * pause, _FIND_SECONDS)
            self._over.wait(_LEAST_FIND_SECONDS)

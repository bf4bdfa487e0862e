"""Updates of several callers, written by one script.

Of a single heartbeat, the write to Redis' file costs the most. So updates wait a moment for others, and one script
writes all of them; the callers get their answers after it.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, TypeAlias

from mxserver.store.batch import take_waiting
from mxserver.store.errors import StoreEnded, StoreUnavailable

Update: TypeAlias = tuple[str | bytes, ...]
Run: TypeAlias = Callable[[Sequence[Update]], Sequence[Any]]

MOST_TOGETHER = 12  # fewer than threads answer heartbeats; when this many wait, the script runs at once


ANSWER_SECONDS = 20.0  # more than Redis' own time-outs together; below the 30 s that clients wait


class Updates:
    """Passes updates to `run`, several at a time. Thread-safe."""

    def __init__(self, run: Run, linger_seconds: float) -> None:
        """`run` writes updates and returns an answer for each; it raises StoreUnavailable. With `linger_seconds` 0
        each update runs alone, in its caller's thread.
        """
        self._run = run
        self._linger_seconds = linger_seconds
        self._waiting: queue.SimpleQueue[tuple[Update, Future[Any]] | None] = queue.SimpleQueue()
        self._enough = threading.Event()
        self._submitting = threading.Lock()
        self._closed = False
        self._thread: threading.Thread | None = None
        if linger_seconds:
            self._thread = threading.Thread(target=self._work, name="redis-updates", daemon=True)
            self._thread.start()

    def submit(self, update: Update) -> Any:
        """The answer to this update, once it is kept. Raises StoreUnavailable."""
        if self._thread is None:
            return self._run([update])[0]
        answer: Future[Any] = Future()
        with self._submitting:
            if self._closed:
                raise StoreUnavailable("the store is closed: the server is shutting down")
            self._waiting.put((update, answer))
        if self._waiting.qsize() >= MOST_TOGETHER:
            self._enough.set()
        try:
            return answer.result(timeout=ANSWER_SECONDS)
        except TimeoutError:
            kept = "nothing of it is kept" if answer.cancel() else "whether it is kept will show: ask again"
            raise StoreUnavailable(f"Redis did not answer within {ANSWER_SECONDS:g} s; {kept}") from None

    def require_working(self) -> None:
        """Raises StoreEnded where the thread has ended that writes updates."""
        if self._thread is not None and not self._closed and not self._thread.is_alive():
            raise StoreEnded("the thread that writes updates to Redis has ended; restart mxserver")

    def close(self) -> None:
        """Finishes what waits. Idempotent."""
        with self._submitting:
            if not self._closed:
                self._closed = True
                self._waiting.put(None)
                self._enough.set()
        if self._thread is not None:
            self._thread.join()

    def _work(self) -> None:
        while (first := self._waiting.get()) is not None:
            if not self._closed:
                self._enough.wait(self._linger_seconds)
                self._enough.clear()
            batch = take_waiting(self._waiting, first, MOST_TOGETHER)
            self._keep([each for each in batch if each[1].set_running_or_notify_cancel()])

    def _keep(self, batch: list[tuple[Update, Future[Any]]]) -> None:
        """Never raises: the thread goes on, and those who asked are told."""
        if not batch:
            return
        try:
            answers = self._run([update for update, _ in batch])
            if len(answers) != len(batch):
                raise StoreUnavailable(f"Redis gave {len(answers)} answers to {len(batch)} updates")
        except StoreUnavailable as error:
            for _, answer in batch:
                answer.set_exception(StoreUnavailable(*error.args))  # each its own: they are raised in many threads
            return
        except BaseException as error:  # noqa: BLE001 - nobody expected it
            for _, answer in batch:
                answer.set_exception(StoreUnavailable(f"the update failed: {error!r}"))
            return
        for (_, answer), outcome in zip(batch, answers, strict=True):
            answer.set_result(outcome)

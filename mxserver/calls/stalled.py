"""Streams of answers that nobody takes end after a minute: each holds a thread, and a file."""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections.abc import Iterator
from typing import Any

import grpc

from mxserver.calls.handlers import Handler, HandlerInterceptor, behaviour_of, with_behaviour
from mxserver.calls.pushed import is_without_thread
from mxserver.periodic import Periodic

_LOG = logging.getLogger(__name__)

STALLED_SECONDS = 60.0


class StalledStreams(HandlerInterceptor):
    """Cancels streams whose last answer was not taken for long. Thread-safe. A stream that has nothing to say may wait.

    `start` once the server answers calls, `stop` after it has stopped.
    """

    def __init__(self, stalled_seconds: float = STALLED_SECONDS) -> None:
        super().__init__()
        self._seconds = stalled_seconds
        self._lock = threading.Lock()
        self._since: dict[grpc.ServicerContext, tuple[str, float]] = {}  # method, and when the answer was given
        self._looker = Periodic("stalled-streams", stalled_seconds / 10, self._end_stalled)

    def start(self) -> None:
        """Call once."""
        self._looker.start()

    def stop(self) -> None:
        """Idempotent."""
        self._looker.stop()

    def _wraps(self, method: str, handler: Handler) -> bool:
        return bool(handler.response_streaming) and not is_without_thread(behaviour_of(handler))

    def _replacement(self, method: str, handler: Handler) -> Handler:
        behaviour = behaviour_of(handler)

        @functools.wraps(behaviour)  # keeps a method's own thread pool
        def answers(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
            try:
                for answer in behaviour(request, context):
                    with self._lock:
                        self._since[context] = method, time.monotonic()
                    yield answer
                    with self._lock:
                        del self._since[context]
            finally:
                with self._lock:
                    self._since.pop(context, None)

        return with_behaviour(handler, answers)

    def _end_stalled(self) -> None:
        latest = time.monotonic() - self._seconds
        with self._lock:
            stalled = [(context, method) for context, (method, since) in self._since.items() if since < latest]
        for context, method in stalled:
            _LOG.warning("stream ended method=%s peer=%s: nothing of it was taken for long", method, context.peer())
            context.cancel()

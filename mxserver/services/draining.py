"""Refusing new calls with a reason while running calls finish.

`grpc.Server.stop` alone ends calls that have arrived but not begun with CANCELLED, which clients do not treat as an
outage. So new calls are first answered UNAVAILABLE, and the server stops after callers had time to notice.
"""

from __future__ import annotations

import threading
import time
from typing import Any, NoReturn

import grpc

from mxserver.calls import refuse, with_behaviour

QUIET_SECONDS = 0.1
LONGEST_WAIT_SECONDS = 1.0

_ANSWERED_TO_THE_END = "/grpc.health.v1.Health/"  # says NOT_SERVING by itself

_REASON = "the server is draining; try again on another server, or after the restart"


def _refuse(_: object, context: grpc.ServicerContext) -> NoReturn:
    refuse(context, grpc.StatusCode.UNAVAILABLE, _REASON)


class DrainInterceptor(grpc.ServerInterceptor):
    """Lets all calls pass until `drain`. Thread-safe."""

    def __init__(self) -> None:
        self._draining = threading.Event()
        self._last_refused_at = 0.0

    def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        handler = continuation(handler_call_details)
        if not self._draining.is_set() or handler is None:
            return handler
        if handler_call_details.method.startswith(_ANSWERED_TO_THE_END):
            return handler
        self._last_refused_at = time.monotonic()
        return with_behaviour(handler, _refuse)

    def drain(self) -> None:
        """Refuses calls from now on. Returns after a moment without calls, or after LONGEST_WAIT_SECONDS."""
        self._draining.set()
        started_at = self._last_refused_at = time.monotonic()
        while (now := time.monotonic()) < started_at + LONGEST_WAIT_SECONDS:
            quiet_for = now - self._last_refused_at
            if quiet_for >= QUIET_SECONDS:
                return
            time.sleep(QUIET_SECONDS - quiet_for)

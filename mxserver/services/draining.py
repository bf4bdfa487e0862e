"""Refusing new calls with a reason while those that run finish.

`grpc.Server.stop` alone ends calls that had arrived and not begun with CANCELLED, which clients do not take for an
outage. So new calls are answered UNAVAILABLE first, and the server stops once callers had time to notice.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

import grpc

if TYPE_CHECKING:
    Handler: TypeAlias = grpc.RpcMethodHandler[Any, Any]

QUIET_SECONDS = 0.1
LONGEST_WAIT_SECONDS = 1.0

_ANSWERED_TO_THE_END = "/grpc.health.v1.Health/"  # says NOT_SERVING by itself

_MAKERS: dict[tuple[bool, bool], Callable[..., Handler]] = {
    (False, False): grpc.unary_unary_rpc_method_handler,
    (False, True): grpc.unary_stream_rpc_method_handler,
    (True, False): grpc.stream_unary_rpc_method_handler,
    (True, True): grpc.stream_stream_rpc_method_handler,
}


def _refuse(_: object, context: grpc.ServicerContext) -> NoReturn:
    context.abort(grpc.StatusCode.UNAVAILABLE, "the server is draining; try again, on another one or after its restart")
    raise AssertionError("abort returned")


class DrainInterceptor(grpc.ServerInterceptor):
    """Lets all calls pass until `drain`. Thread-safe."""

    def __init__(self) -> None:
        self._draining = threading.Event()
        self._last_refused_at = 0.0

    def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Handler | None], details: grpc.HandlerCallDetails
    ) -> Handler | None:
        handler = continuation(details)
        if not self._draining.is_set() or handler is None or details.method.startswith(_ANSWERED_TO_THE_END):
            return handler
        self._last_refused_at = time.monotonic()
        make = _MAKERS[handler.request_streaming, handler.response_streaming]
        return make(_refuse, handler.request_deserializer, handler.response_serializer)

    def drain(self) -> None:
        """Refuses calls from now on, and returns when none came for a moment, or too many go on coming."""
        self._draining.set()
        started_at = self._last_refused_at = time.monotonic()
        while (now := time.monotonic()) < started_at + LONGEST_WAIT_SECONDS:
            quiet_for = now - self._last_refused_at
            if quiet_for >= QUIET_SECONDS:
                return
            time.sleep(QUIET_SECONDS - quiet_for)

"""What happens around every gRPC call: measuring it, and tracing it where that is wanted."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any

import grpc

from mxserver.calls import Around, WrappingInterceptor
from mxserver.telemetry.events import Events
from mxserver.telemetry.metrics import UNKNOWN, Metrics

# When the call that is answered arrived (time.perf_counter): grpcio runs interceptors and the call in one context.
_ARRIVED: ContextVar[float | None] = ContextVar("arrived", default=None)

_FAILURES = (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN)


@contextmanager
def telling_status(context: grpc.ServicerContext, tell: Callable[[grpc.StatusCode], None]) -> Iterator[None]:
    """Around a call: tells the status with which it ends. UNKNOWN: the method raised and had set none."""
    unless_set = grpc.StatusCode.UNKNOWN
    try:
        yield
        unless_set = grpc.StatusCode.OK
    finally:
        tell(context.code() or unless_set)  # type: ignore[attr-defined] # types-grpcio does not know `code`


class ObservingInterceptor(WrappingInterceptor):
    """Runs context managers around every call, the first one outermost."""

    def __init__(self, arounds: list[Around], on_unknown_method: Callable[[], None]) -> None:
        super().__init__()
        self._arounds = arounds
        self._on_unknown_method = on_unknown_method

    def intercept_service(self, continuation: Callable[[Any], Any], handler_call_details: Any) -> Any:
        _ARRIVED.set(time.perf_counter())
        handler = super().intercept_service(continuation, handler_call_details)
        if handler is None:
            self._on_unknown_method()
        return handler

    def _wraps(self, method: str, handler: Any) -> bool:
        return True

    @contextmanager
    def _around(self, method: str, context: grpc.ServicerContext) -> Iterator[None]:
        with ExitStack() as stack:
            for around in self._arounds:
                stack.enter_context(around(method, context))
            yield


def call_metrics(metrics: Metrics, events: Events) -> tuple[Around, Callable[[], None]]:
    """Two functions that measure calls: one goes around each call, one counts calls of unknown methods.

    The time in which a call waits for a thread counts (tests/web/test_metrics.py).
    """
    observers: dict[tuple[str, str], Callable[[float], None]] = {}

    def observe(method: str, code: str, seconds: float) -> None:
        observer = observers.get((method, code))
        if observer is None:
            observer = observers[method, code] = metrics.call_seconds.labels(method, code).observe
        observer(seconds)

    @contextmanager
    def measured(method: str, context: grpc.ServicerContext) -> Iterator[None]:
        arrived = _ARRIVED.get()
        started = time.perf_counter() if arrived is None else arrived
        metrics.calls_in_progress.inc()

        def ended(code: grpc.StatusCode) -> None:
            metrics.calls_in_progress.dec()
            observe(method.lstrip("/"), code.name, time.perf_counter() - started)
            if code in _FAILURES:
                events.add("call", f"{method.lstrip('/')} ended with {code.name}; the log has the reason")

        with telling_status(context, ended):
            yield

    return measured, lambda: observe(UNKNOWN, grpc.StatusCode.UNIMPLEMENTED.name, 0.0)

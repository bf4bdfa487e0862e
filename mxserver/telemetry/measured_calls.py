"""What happens around every gRPC call: measuring, and tracing where it is wanted."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import grpc

from mxserver.telemetry.events import Events
from mxserver.telemetry.metrics import UNKNOWN, Metrics

Around = Callable[[str, grpc.ServicerContext], AbstractContextManager[None]]
"""Called with the method's full name; entered before the call is answered, left when the answer is complete."""

_FAILURES = (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN)


def status_of(context: grpc.ServicerContext) -> grpc.StatusCode | None:
    """The status that a method has set, None when it has not; types-grpcio does not know `code`."""
    status: grpc.StatusCode | None = context.code()  # type: ignore[attr-defined]
    return status


class AroundCalls(grpc.ServerInterceptor):  # type: ignore[misc,unused-ignore] # grpc has types only beside it
    """Runs context managers around every call, the first one outermost."""

    def __init__(self, arounds: list[Around], on_unknown_method: Callable[[], None]) -> None:
        self._arounds = arounds
        self._on_unknown_method = on_unknown_method
        self._wrapped: dict[str, tuple[Any, Any]] = {}  # method -> (its handler, the handler around that)

    def intercept_service(self, continuation: Callable[[Any], Any], handler_call_details: Any) -> Any:
        handler = continuation(handler_call_details)
        if handler is None:
            self._on_unknown_method()
            return None
        method: str = handler_call_details.method
        known = self._wrapped.get(method)
        if known is None or known[0] is not handler:
            known = self._wrapped[method] = (handler, self._wrap(method, handler))
        return known[1]

    @contextmanager
    def _around(self, method: str, context: grpc.ServicerContext) -> Iterator[None]:
        with ExitStack() as stack:
            for around in self._arounds:
                stack.enter_context(around(method, context))
            yield

    def _wrap(self, method: str, handler: Any) -> Any:
        """The server's methods take one request; those that answer in callbacks (health's Watch) stay as they are."""
        behaviour = handler.unary_stream if handler.response_streaming else handler.unary_unary
        if behaviour is None or getattr(behaviour, "experimental_non_blocking", False):
            return handler

        @functools.wraps(behaviour)  # keeps what grpcio reads off a method, such as a thread pool of its own
        def answer(request: Any, context: grpc.ServicerContext) -> Any:
            with self._around(method, context):
                return behaviour(request, context)

        @functools.wraps(behaviour)
        def answers(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
            with self._around(method, context):
                yield from behaviour(request, context)

        make: Callable[..., Any] = grpc.unary_unary_rpc_method_handler
        wrapped: Any = answer
        if handler.response_streaming:
            make, wrapped = grpc.unary_stream_rpc_method_handler, answers
        if pool := getattr(behaviour, "experimental_thread_pool", None):  # long streams run in threads of their own
            wrapped.experimental_thread_pool = pool
        return make(
            wrapped,
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )


def call_metrics(metrics: Metrics, events: Events) -> tuple[Around, Callable[[], None]]:
    """What measures calls: around each, and at one of a method that the server does not have."""
    observers: dict[tuple[str, str], Callable[[float], None]] = {}

    def observe(method: str, code: str, seconds: float) -> None:
        observer = observers.get((method, code))
        if observer is None:
            observer = observers[method, code] = metrics.call_seconds.labels(method, code).observe
        observer(seconds)

    @contextmanager
    def measured(method: str, context: grpc.ServicerContext) -> Iterator[None]:
        started = time.perf_counter()
        metrics.calls_in_progress.inc()
        code = grpc.StatusCode.UNKNOWN
        try:
            yield
            code = status_of(context) or grpc.StatusCode.OK
        except BaseException:
            code = status_of(context) or grpc.StatusCode.UNKNOWN
            raise
        finally:
            metrics.calls_in_progress.dec()
            observe(method.lstrip("/"), code.name, time.perf_counter() - started)
            if code in _FAILURES:
                events.add("call", f"{method.lstrip('/')} ended with {code.name}; the log has the reason")

    return measured, lambda: observe(UNKNOWN, grpc.StatusCode.UNIMPLEMENTED.name, 0.0)

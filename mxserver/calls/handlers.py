"""The wrapper of gRPC method handlers: one for all four kinds (one request or a stream, one answer or a stream)."""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, TypeAlias

import grpc

from mxserver.calls.pushed import is_without_thread

Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"  # generic in its stubs alone

Around: TypeAlias = Callable[[str, grpc.ServicerContext], AbstractContextManager[None]]
"""Called with the method's full name. Entered before the call is answered, left when the answer is complete; where a
stream needs no thread (pushed.py), when it has begun."""

_KINDS: dict[tuple[bool, bool], tuple[str, Callable[..., Any]]] = {
    (False, False): ("unary_unary", grpc.unary_unary_rpc_method_handler),
    (False, True): ("unary_stream", grpc.unary_stream_rpc_method_handler),
    (True, False): ("stream_unary", grpc.stream_unary_rpc_method_handler),
    (True, True): ("stream_stream", grpc.stream_stream_rpc_method_handler),
}


def behaviour_of(handler: Handler) -> Callable[..., Any]:
    """The function that answers calls of this handler."""
    behaviour: Callable[..., Any] = getattr(handler, _KINDS[handler.request_streaming, handler.response_streaming][0])
    return behaviour


def with_behaviour(handler: Handler, behaviour: Callable[..., Any]) -> Handler:
    """A handler of the same kind with the same serializers, answered by another function."""
    return made_handler(
        handler,
        behaviour,
        request_deserializer=handler.request_deserializer,
        response_serializer=handler.response_serializer,
    )


def made_handler(
    handler: Handler, behaviour: Callable[..., Any], *, request_deserializer: Any, response_serializer: Any
) -> Handler:
    """As `with_behaviour`, with other serializers; None: requests stay bytes, and answers are bytes."""
    made: Handler = _KINDS[handler.request_streaming, handler.response_streaming][1](
        behaviour, request_deserializer=request_deserializer, response_serializer=response_serializer
    )
    return made


def wrapped(method: str, handler: Handler, around: Around) -> Handler:
    """The handler with `around` around each of its calls."""
    behaviour = behaviour_of(handler)

    @functools.wraps(behaviour)  # keeps the attributes that grpcio reads, such as a method's own thread pool
    def answer(request: Any, context: grpc.ServicerContext) -> Any:
        with around(method, context):
            return behaviour(request, context)

    @functools.wraps(behaviour)
    def answers(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        with around(method, context):
            yield from behaviour(request, context)

    @functools.wraps(behaviour)
    def begin(request: Any, context: grpc.ServicerContext, send: Any) -> None:
        with around(method, context):
            behaviour(request, context, send)

    if is_without_thread(behaviour):
        return with_behaviour(handler, begin)
    return with_behaviour(handler, answers if handler.response_streaming else answer)


class HandlerInterceptor(grpc.ServerInterceptor):
    """Base of our interceptors: replaces each handler once, at its first call."""

    def __init__(self) -> None:
        self._replaced: dict[str, tuple[Handler, Handler]] = {}  # method -> (its handler, what stands for that)

    def intercept_service(self, continuation: Callable[[Any], Any], handler_call_details: Any) -> Any:
        handler = continuation(handler_call_details)
        method: str = handler_call_details.method
        if handler is None or not self._wraps(method, handler):
            return handler
        known = self._replaced.get(method)
        if known is None or known[0] is not handler:
            known = self._replaced[method] = (handler, self._replacement(method, handler))
        return known[1]

    @abstractmethod
    def _wraps(self, method: str, handler: Handler) -> bool:
        """Whether this method's handler is replaced."""

    @abstractmethod
    def _replacement(self, method: str, handler: Handler) -> Handler:
        """What answers instead of the handler."""


class WrappingInterceptor(HandlerInterceptor):
    """Base of interceptors that do something before and after each call."""

    def _replacement(self, method: str, handler: Handler) -> Handler:
        return wrapped(method, handler, self._around)

    @abstractmethod
    def _around(self, method: str, context: grpc.ServicerContext) -> AbstractContextManager[None]:
        """Held around a call. If it raises or aborts, the call ends."""

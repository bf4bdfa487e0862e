"""What stands before every call: who calls, may they, and do they take too much at once."""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, TypeAlias

import grpc

from mxserver.security.roles import CALLER, AccessError, AccessUnknown, Caller, Role, Unauthenticated, required_role

if TYPE_CHECKING:
    Handler: TypeAlias = grpc.RpcMethodHandler[Any, Any]

_LOG = logging.getLogger(__name__)

Guard: TypeAlias = Callable[[str, grpc.ServicerContext], AbstractContextManager[None]]
"""Called with the method's full name; aborts the call, or is left when the call has ended."""

_BEARER = "bearer "
_LONGEST_TOKEN = 16 * 1024

_KINDS: dict[tuple[bool, bool], tuple[str, Callable[..., Any]]] = {
    (False, False): ("unary_unary", grpc.unary_unary_rpc_method_handler),
    (False, True): ("unary_stream", grpc.unary_stream_rpc_method_handler),
    (True, False): ("stream_unary", grpc.stream_unary_rpc_method_handler),
    (True, True): ("stream_stream", grpc.stream_stream_rpc_method_handler),
}


def guarded(method: str, handler: Handler, guard: Guard) -> Handler:
    """The handler behind a guard, of the handler's own kind, so that a refusal is an answer of that kind."""
    name, make = _KINDS[handler.request_streaming, handler.response_streaming]
    behaviour = getattr(handler, name)

    @functools.wraps(behaviour)  # keeps what grpcio reads off a method, such as a thread pool of its own
    def answer(request: Any, context: grpc.ServicerContext) -> Any:
        with guard(method, context):
            return behaviour(request, context)

    @functools.wraps(behaviour)
    def answers(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        with guard(method, context):
            yield from behaviour(request, context)

    wrapped: Handler = make(
        answers if handler.response_streaming else answer,
        request_deserializer=handler.request_deserializer,
        response_serializer=handler.response_serializer,
    )
    return wrapped


class _Guarding(grpc.ServerInterceptor):  # type: ignore[misc,unused-ignore] # grpc has types only beside it
    """Puts a guard before handlers, and remembers the guarded ones."""

    def __init__(self) -> None:
        self._guarded: dict[str, tuple[Handler, Handler]] = {}

    def intercept_service(self, continuation: Callable[[Any], Any], handler_call_details: Any) -> Any:
        handler = continuation(handler_call_details)
        method: str = handler_call_details.method
        if handler is None or not self._guards(method, handler):
            return handler
        known = self._guarded.get(method)
        if known is None or known[0] is not handler:
            known = self._guarded[method] = (handler, guarded(method, handler, self._guard))
        return known[1]

    @abstractmethod
    def _guards(self, method: str, handler: Handler) -> bool:
        """Whether calls of this method are guarded."""

    @abstractmethod
    def _guard(self, method: str, context: grpc.ServicerContext) -> AbstractContextManager[None]:
        """Held around a call; what it raises or aborts ends the call."""


class Authenticator(Protocol):
    """Says whose token it is."""

    def authenticate(self, token: bytes) -> Caller:
        """Raises Unauthenticated and AccessUnknown."""


class AccessInterceptor(_Guarding):
    """Lets a call pass whose caller has the method's role; `roles.CALLER` is who calls while it runs. Thread-safe."""

    def __init__(self, authenticator: Authenticator | None) -> None:
        """Without an authenticator, callers are told apart by their certificates and may do everything."""
        super().__init__()
        self._authenticator = authenticator

    def _guards(self, method: str, handler: Handler) -> bool:
        return required_role(method) is not None

    @contextmanager
    def _guard(self, method: str, context: grpc.ServicerContext) -> Iterator[None]:
        try:
            caller = self._admit(method, context)
        except AccessUnknown as error:
            _refuse(context, grpc.StatusCode.UNAVAILABLE, error)
        except Unauthenticated as error:
            _LOG.info("call refused method=%s peer=%s reason=%s", method, context.peer(), error)
            _refuse(context, grpc.StatusCode.UNAUTHENTICATED, error)
        except AccessError as error:
            _LOG.info("call refused method=%s peer=%s reason=%s", method, context.peer(), error)
            _refuse(context, grpc.StatusCode.PERMISSION_DENIED, error)
        before = CALLER.set(caller)
        try:
            yield
        finally:
            # A stream may go on in another thread; what it set there is nobody else's.
            with contextlib.suppress(ValueError):
                CALLER.reset(before)

    def _admit(self, method: str, context: grpc.ServicerContext) -> Caller:
        if self._authenticator is None:
            return Caller(_subject_of_certificate(context), Role.ADMIN)
        caller = self._authenticator.authenticate(_token(context))
        needed = required_role(method)
        if needed is not None and caller.role < needed:
            raise AccessError(
                f"{caller.subject} has the role {caller.role.name.lower()}; {method} needs {needed.name.lower()}"
            )
        return caller


def _token(context: grpc.ServicerContext) -> bytes:
    values = [value for key, value in context.invocation_metadata() or () if key == "authorization"]
    if len(values) != 1 or not isinstance(values[0], str) or not values[0].lower().startswith(_BEARER):
        raise Unauthenticated("the call carries no token; set MX_AUTH_TOKEN_PATH to the file that has it")
    token = values[0][len(_BEARER) :].strip()
    if not token or len(token) > _LONGEST_TOKEN:
        raise Unauthenticated("the token is empty or too long")
    return token.encode()


def _subject_of_certificate(context: grpc.ServicerContext) -> str:
    """The first name of a client's certificate; empty without one."""
    names: Any = context.auth_context()
    for kind in ("x509_subject_alternative_name", "x509_common_name"):
        if found := names.get(kind):
            return "certificate:" + str(next(iter(found)), "utf-8", "replace")
    return ""


def _refuse(context: grpc.ServicerContext, status: grpc.StatusCode, error: AccessError) -> NoReturn:
    context.set_trailing_metadata((("mx-error-code", error.code),))
    context.abort(status, str(error))
    raise AssertionError("abort returned")


class StreamLimit(_Guarding):
    """Refuses a client more than so many streams at once; a stream holds a thread and a file. Thread-safe.

    A client is who calls, where callers are told apart, or else a host.
    """

    def __init__(self, most_per_client: int) -> None:
        super().__init__()
        self._most = most_per_client
        self._lock = threading.Lock()
        self._open: Counter[str] = Counter()

    def _guards(self, method: str, handler: Handler) -> bool:
        behaviour = handler.unary_stream or handler.stream_stream
        # Health's Watch answers in callbacks and holds no thread; gRPC limits it by connection.
        return handler.response_streaming and not getattr(behaviour, "experimental_non_blocking", False)

    @contextmanager
    def _guard(self, method: str, context: grpc.ServicerContext) -> Iterator[None]:
        caller = CALLER.get()
        client = f"caller {caller.subject}" if caller and caller.subject else f"host {_host(context.peer())}"
        with self._lock:
            if self._open[client] >= self._most:
                allowed = False
            else:
                allowed = True
                self._open[client] += 1
        if not allowed:
            context.abort(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"{client} has {self._most} streams open, which is the limit (MX_SERVER_MAX_STREAMS); try again later",
            )
        try:
            yield
        finally:
            with self._lock:
                self._open[client] -= 1
                if not self._open[client]:
                    del self._open[client]


def _host(peer: str) -> str:
    """The host of `ipv4:10.0.0.1:1234` or `ipv6:[::1]:1234`."""
    return peer.rpartition(":")[0]

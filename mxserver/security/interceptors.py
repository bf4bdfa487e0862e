"""What stands before every call: who calls, whether they may, and whether they take too much at once."""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import grpc

from mxserver.calls import Statuses, WrappingInterceptor, refuse, refuse_for, refusing
from mxserver.security.roles import (
    CALLER,
    AccessError,
    AccessUnknown,
    Caller,
    Role,
    Unauthenticated,
    bearer_token,
    required_role,
)

if TYPE_CHECKING:
    from mxserver.calls import Handler

_STATUSES: Statuses = {
    AccessUnknown: grpc.StatusCode.UNAVAILABLE,
    Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    AccessError: grpc.StatusCode.PERMISSION_DENIED,
}


class Authenticator(Protocol):
    """Says whose token it is."""

    def authenticate(self, token: bytes) -> Caller:
        """Raises Unauthenticated and AccessUnknown."""

    def require_plausible(self, token: bytes) -> None:
        """Raises Unauthenticated for what is certainly no token that counts; waits for nothing and nobody."""


class AccessInterceptor(WrappingInterceptor):
    """Lets a call pass whose caller has the method's role; `roles.CALLER` is who calls while it runs. Thread-safe.

    Who has no token, or none that can count, is refused before the request is received: as a call whose requests are a
    stream, of which nothing is asked for.
    """

    def __init__(self, authenticator: Authenticator | None) -> None:
        """Without an authenticator, callers are identified by their certificates and may do everything."""
        super().__init__()
        self._authenticator = authenticator

    def intercept_service(self, continuation: Callable[[Any], Any], handler_call_details: Any) -> Any:
        handler = super().intercept_service(continuation, handler_call_details)
        method: str = handler_call_details.method
        if handler is None or self._authenticator is None or required_role(method) is None:
            return handler
        try:
            self._authenticator.require_plausible(_token(handler_call_details.invocation_metadata))
        except AccessError as error:
            return _refusing_handler(method, handler.response_streaming, error)
        return handler

    def _wraps(self, method: str, handler: Handler) -> bool:
        return required_role(method) is not None

    @contextmanager
    def _around(self, method: str, context: grpc.ServicerContext) -> Iterator[None]:
        with refusing(method, context, _STATUSES):
            caller = self._admit(method, context)
        before = CALLER.set(caller)
        try:
            yield
        finally:
            # A stream may continue in another thread, whose context is its own.
            with contextlib.suppress(ValueError):
                CALLER.reset(before)

    def _admit(self, method: str, context: grpc.ServicerContext) -> Caller:
        if self._authenticator is None and context.peer().startswith("unix"):  # our own probes' socket: no certificates
            raise Unauthenticated("callers without a certificate may only look at the server's health")
        if self._authenticator is None:
            return Caller(_subject_of_certificate(context), Role.ADMIN)
        caller = self._authenticator.authenticate(_token(context.invocation_metadata()))
        needed = required_role(method)
        if needed is not None and caller.role < needed:
            raise AccessError(
                f"{caller.subject} has the role {caller.role.name.lower()}; {method} needs {needed.name.lower()}"
            )
        return caller


def _refusing_handler(method: str, streams_answers: bool, error: AccessError) -> Handler:
    def answer(requests: Iterator[bytes], context: grpc.ServicerContext) -> Any:
        refuse_for(method, context, error, _STATUSES)

    if streams_answers:
        return grpc.stream_stream_rpc_method_handler(answer)
    return grpc.stream_unary_rpc_method_handler(answer)


def _token(metadata: Any) -> bytes:
    values = [value for key, value in metadata or () if key == "authorization"]
    return bearer_token(values[0] if len(values) == 1 and isinstance(values[0], str) else "")


def _subject_of_certificate(context: grpc.ServicerContext) -> str:
    """The first name of a client's certificate; empty without one."""
    names: Any = context.auth_context()
    for kind in ("x509_subject_alternative_name", "x509_common_name"):
        if found := names.get(kind):
            return "certificate:" + str(next(iter(found)), "utf-8", "replace")
    return ""


_WAITS = ("/model_express.model.ModelService/EnsureModelDownloaded",)
WAITING_PER_CLIENT = 256
_LIMITED_BY_THEMSELVES = ("/grpc.health.v1.Health/", "/model_express.mx.WatchService/")


class StreamLimit(WrappingInterceptor):
    """Limits the streams that one client has open; a stream holds a thread and a file. Thread-safe.

    A client is a host, and a caller there where callers are identified: a fleet may share one token. Callers that wait
    for downloads hold no file, and count apart.
    """

    def __init__(self, most_per_client: int) -> None:
        super().__init__()
        self._most = most_per_client
        self._lock = threading.Lock()
        self._open: Counter[tuple[str, str]] = Counter()

    def _wraps(self, method: str, handler: Handler) -> bool:
        # Health's Watch has threads and a limit of its own, beyond which its callers must be told UNIMPLEMENTED; what
        # mxserver/waiting streams holds no thread, and has a limit there.
        return bool(handler.response_streaming) and not method.startswith(_LIMITED_BY_THEMSELVES)

    @contextmanager
    def _around(self, method: str, context: grpc.ServicerContext) -> Iterator[None]:
        caller = CALLER.get()
        client = f"host {_host(context.peer())}"
        if caller and caller.subject:
            client = f"caller {caller.subject} at {client}"
        kind, most = (method, WAITING_PER_CLIENT) if method in _WAITS else ("", self._most)
        counted = (kind, client)
        with self._lock:
            allowed = self._open[counted] < most
            self._open[counted] += allowed
        if not allowed:
            whose = "of callers that wait for downloads" if kind else "streams_per_client of MX_SERVER_LIMITS"
            refuse(
                context,
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"{client} has {most} streams open, which is the limit ({whose}); try again later",
            )
        try:
            yield
        finally:
            with self._lock:
                self._open[counted] -= 1
                if not self._open[counted]:
                    del self._open[counted]


def _host(peer: str) -> str:
    """The host of `ipv4:10.0.0.1:1234` or `ipv6:[::1]:1234`."""
    return peer.rpartition(":")[0]

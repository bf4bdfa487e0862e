"""What stands before every call: who calls, whether they may, and whether they take too much at once."""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import grpc

from mxserver.calls import Statuses, WrappingInterceptor, refuse, refusing
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


class AccessInterceptor(WrappingInterceptor):
    """Lets a call pass whose caller has the method's role; `roles.CALLER` is who calls while it runs. Thread-safe."""

    def __init__(self, authenticator: Authenticator | None) -> None:
        """Without an authenticator, callers are identified by their certificates and may do everything."""
        super().__init__()
        self._authenticator = authenticator

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
        caller = self._authenticator.authenticate(_token(context))
        needed = required_role(method)
        if needed is not None and caller.role < needed:
            raise AccessError(
                f"{caller.subject} has the role {caller.role.name.lower()}; {method} needs {needed.name.lower()}"
            )
        return caller


def _token(context: grpc.ServicerContext) -> bytes:
    values = [value for key, value in context.invocation_metadata() or () if key == "authorization"]
    return bearer_token(values[0] if len(values) == 1 and isinstance(values[0], str) else "")


def _subject_of_certificate(context: grpc.ServicerContext) -> str:
    """The first name of a client's certificate; empty without one."""
    names: Any = context.auth_context()
    for kind in ("x509_subject_alternative_name", "x509_common_name"):
        if found := names.get(kind):
            return "certificate:" + str(next(iter(found)), "utf-8", "replace")
    return ""


class StreamLimit(WrappingInterceptor):
    """Limits the streams that one client has open; a stream holds a thread and a file. Thread-safe.

    A client is the caller, where callers are identified, or else the host.
    """

    def __init__(self, most_per_client: int) -> None:
        super().__init__()
        self._most = most_per_client
        self._lock = threading.Lock()
        self._open: Counter[str] = Counter()

    def _wraps(self, method: str, handler: Handler) -> bool:
        # Health's Watch has threads and a limit of its own, beyond which its callers must be told UNIMPLEMENTED.
        return bool(handler.response_streaming) and not method.startswith("/grpc.health.v1.Health/")

    @contextmanager
    def _around(self, method: str, context: grpc.ServicerContext) -> Iterator[None]:
        caller = CALLER.get()
        client = f"caller {caller.subject}" if caller and caller.subject else f"host {_host(context.peer())}"
        with self._lock:
            if self._open[client] >= self._most:
                allowed = False
            else:
                allowed = True
                self._open[client] += 1
        if not allowed:
            refuse(
                context,
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

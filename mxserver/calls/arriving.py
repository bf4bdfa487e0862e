"""One call between its headers and its answer, as grpcio hands it to a thread pool.

grpcio waits for a call's request in the thread that is to answer it: as many calls as there are threads, whose requests
never come, and nobody is answered. Here the request comes first, without a thread. That needs parts of grpcio that are
not public; `ArrivingCall.of` returns None where they look otherwise, and the test
tests/server/services/test_call_pool.py fails where that happens.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import grpc
from grpc import _server  # not public
from grpc._cython import cygrpc  # type: ignore[attr-defined] # not public


class Request:
    """The bytes of a request, held once: who takes them is the only one to have them."""

    __slots__ = ("data",)

    def __init__(self, data: bytes) -> None:
        self.data = data

    def take(self) -> bytes:
        data, self.data = self.data, b""
        return data


class ArrivingCall:
    """A call that was accepted and has no thread yet. Each method is called once, `is_there` any time."""

    def __init__(self, run: Any, answer: Any, event: Any, state: Any, behaviour: Any, request: Any, rest: Any) -> None:
        self._run, self._answer, self._event, self._state = run, answer, event, state
        self._behaviour, self._request, self._rest = behaviour, request, rest
        self.ended: Future[None] = Future()
        """Done when the call has been answered, or needs no answer; grpcio counts running calls by it."""
        self.is_streaming = getattr(request, "__name__", "") != "unary_request"
        peer = event.call.peer()
        self.connection: str = peer if isinstance(peer, str) else peer.decode()
        self.host = self.connection.rpartition(":")[0]

    @classmethod
    def of(cls, run: Any, arguments: tuple[Any, ...]) -> ArrivingCall | None:
        """The call out of what grpcio submits to a pool; None where it is something else."""
        if len(arguments) != 7 or not hasattr(arguments[1], "call") or not hasattr(arguments[2], "condition"):
            return None
        return cls(run, *arguments[:5], arguments[5:])

    def is_there(self) -> bool:
        """Whether somebody still waits for the answer."""
        with self._state.condition:
            return bool(_server._is_rpc_state_active(self._state))

    def receive(self, received: Callable[[], None]) -> None:
        """Has the request come, and calls `received` then, or when the call has ended without."""
        state, call = self._state, self._event.call
        store = _server._receive_message(state, call, self._rest[0])

        def arrived(event: Any) -> Any:
            finished = store(event)
            received()
            return finished

        with state.condition:
            if _server._is_rpc_state_active(state):
                call.start_server_batch((cygrpc.ReceiveMessageOperation(0),), arrived)
                state.due.add(_server._RECEIVE_MESSAGE_TOKEN)
                return
        received()

    @property
    def needs_request(self) -> bool:
        """Whether it is to be received before the answer."""
        return not self.is_streaming and self.request is None

    @property
    def request(self) -> bytes | None:
        """The request that is there and not yet answered, where it stays bytes until then."""
        request = self._state.request
        return request if isinstance(request, bytes) else None

    def answer(self) -> None:
        """Answers the call, in this thread."""
        try:
            request = self._request if self.is_streaming else self._arrived
            self._run(self._answer, self._event, self._state, self._behaviour, request, *self._rest)
        finally:
            self.ended.set_result(None)

    def after_events(self, then: Callable[[], None]) -> None:
        """Calls `then` when everything was told that had happened by now, in the thread that tells of events."""
        with self._state.condition:
            if _server._is_rpc_state_active(self._state):
                self._event.call.start_server_batch((), lambda event: (None, (then,)))

    def refuse(self, status: grpc.StatusCode, reason: str) -> None:
        """Ends the call, whatever has come of it."""
        state = self._state
        with state.condition:
            if _server._is_rpc_state_active(state):
                state.code, state.details = status, reason.encode()
                _server._abort(state, self._event.call, cygrpc.StatusCode.unknown, b"")

    def _arrived(self) -> Any:
        """The request; None, and the call is over, if it ended without one."""
        state = self._state
        with state.condition:
            if state.request is None and state.client is _server._CLOSED and _server._is_rpc_state_active(state):
                details = b"the call needs exactly one request"
                _server._abort(state, self._event.call, cygrpc.StatusCode.unimplemented, details)
            request, state.request = state.request, None
            return Request(request) if isinstance(request, bytes) else request

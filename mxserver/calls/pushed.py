"""Streams of answers that need no thread while they have nothing to say.

grpcio keeps a thread for each stream that it takes answers from. A method that is `without_thread` only begins the
stream; what is said later is sent from whichever thread has it, and grpcio tells in its own thread when it was taken.
That needs parts of grpcio that are not public; tests/server/services/test_watches.py fails where they change.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import grpc
from grpc import _server  # not public
from grpc._cython import cygrpc  # type: ignore[attr-defined] # not public

Begin = TypeVar("Begin", bound=Callable[..., Any])

_MARK = "experimental_non_blocking"  # grpcio reads it: the function gets a third argument, and its return ends nothing


def without_thread(begin: Begin) -> Begin:
    """Marks a function (request, context, send) that begins a stream of answers and returns: see PushedStream."""
    setattr(begin, _MARK, True)
    return begin


def is_without_thread(behaviour: Callable[..., Any]) -> bool:
    """Whether a method's function only begins a stream."""
    return bool(getattr(behaviour, _MARK, False))


class PushedStream:
    """One open stream. It has one message on its way at most, and the newest that waits: older ones are left out.

    Thread-safe; nothing here waits for the reader.
    """

    def __init__(self, context: grpc.ServicerContext, ended: Callable[[], None]) -> None:
        """`ended` is called once the stream is over, whoever ends it, in the thread that tells of events; or here."""
        whole: Any = context
        self._context, self._event, self._state = context, whole._rpc_event, whole._state
        self._lock = threading.Lock()
        self._waiting: bytes | None = None
        self._sent_at: float | None = None  # monotonic, of the message that is on its way
        if not context.add_callback(ended):
            ended()

    @property
    def unread_seconds(self) -> float:
        """For how long a message has not been taken; 0 while none is on its way."""
        since = self._sent_at
        return 0.0 if since is None else time.monotonic() - since

    def push(self, message: bytes) -> None:
        """Sends it, now or once the one before was taken. Nothing happens after the end."""
        with self._lock:
            if self._sent_at is not None:
                self._waiting = message
                return
            self._sent_at = time.monotonic()
        self._send(message)

    def end(self, status: grpc.StatusCode, reason: str) -> None:
        """Ends it with a status; what was not taken yet comes before that."""
        with self._state.condition:
            if _server._is_rpc_state_active(self._state):
                self._state.code, self._state.details = status, reason.encode()
                _server._abort(self._state, self._event.call, cygrpc.StatusCode.unknown, b"")

    def cut(self) -> None:
        """Ends it at once (CANCELLED), whatever was not taken."""
        self._context.cancel()

    def _send(self, message: bytes) -> None:
        state = self._state
        with state.condition:
            if not _server._is_rpc_state_active(state):
                return
            operations = [cygrpc.SendMessageOperation(message, 0)]
            if state.initial_metadata_allowed:
                operations.insert(0, _server._get_initial_metadata_operation(state, None))
                state.initial_metadata_allowed = False
            state.due.add(_server._SEND_MESSAGE_TOKEN)
            self._event.call.start_server_batch(operations, self._taken)

    def _taken(self, event: Any) -> Any:
        """In the thread that tells of events."""
        with self._state.condition:
            finished = _server._possibly_finish_call(self._state, _server._SEND_MESSAGE_TOKEN)
        with self._lock:
            message, self._waiting = self._waiting, None
            self._sent_at = None if message is None else time.monotonic()
        if message is not None:
            self._send(message)
        return finished

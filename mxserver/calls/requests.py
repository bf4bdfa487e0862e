"""Requests are received and parsed after it is known who calls, and only up to their method's limit.

grpcio receives and parses a request before anything of ours runs. As a stream of requests it does neither before they
are asked for, and a stream of one request is on the wire what a single request is. So every method is answered as if
it took a stream: what stands around it (who calls, whether the server drains) decides first, and a caller who is
refused has cost no more than HTTP/2's window (tests/security/test_admission.py).
"""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from mxserver.calls.handlers import Handler, HandlerInterceptor, behaviour_of
from mxserver.calls.refusals import refuse
from mxserver.limits import ServerLimits

_LOG = logging.getLogger(__name__)

PUBLISH = "/model_express.p2p.P2pService/PublishMetadata"

RECEIVE_SECONDS = 20.0  # from the moment in which a thread has time for a request until all of it must be there
CROWDED_RECEIVE_SECONDS = 1.0  # where half of the threads of its kind wait for requests
RECEIVED_AT_ONCE = 4  # requests that publish: as many times their limit is the memory for what is not there yet
ROOM_SECONDS = 15.0  # how long a publish waits for others to be stored
SMALL_BYTES = 64 * 1024  # not worth counting

_LOOK_SECONDS = 0.25


class _Reception:
    """A request that a thread waits for."""

    def __init__(self, method: str, context: grpc.ServicerContext) -> None:
        self.method = method
        self.context = context
        self.since = time.monotonic()
        self.was_cut = False


class Receptions:
    """The requests that threads wait for; those that take too long are cut. Thread-safe; `close` must be called.

    A caller who sends half a request holds a thread. With a deadline that is short as soon as several do, they cannot
    hold all for long.
    """

    def __init__(self, threads_of: Callable[[str], int]) -> None:
        """`threads_of` a method: how many answer it and its kind."""
        self._threads_of = threads_of
        self._lock = threading.Lock()
        self._waiting: dict[int, _Reception] = {}
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="receptions", daemon=True)
        self._thread.start()

    @contextmanager
    def waiting(self, method: str, context: grpc.ServicerContext) -> Iterator[_Reception]:
        """Around the wait for one request."""
        reception = _Reception(method, context)
        with self._lock:
            self._waiting[id(reception)] = reception
        try:
            yield reception
        finally:
            with self._lock:
                del self._waiting[id(reception)]

    def close(self) -> None:
        """Idempotent."""
        self._stopping.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stopping.wait(_LOOK_SECONDS):
            for reception in self._late(time.monotonic()):
                reception.was_cut = True
                reception.context.cancel()

    def _late(self, now: float) -> list[_Reception]:
        with self._lock:
            waiting = list(self._waiting.values())
        crowds: dict[str, int] = {}
        for one in waiting:
            crowds[one.method] = crowds.get(one.method, 0) + 1
        return [
            one
            for one in waiting
            if now - one.since
            > (CROWDED_RECEIVE_SECONDS if 2 * crowds[one.method] >= self._threads_of(one.method) else RECEIVE_SECONDS)
        ]


class _Room:
    """The bytes of publishes that are at work. Thread-safe."""

    def __init__(self, limits: ServerLimits) -> None:
        self._most = limits.publishes_bytes
        self._free = limits.publishes_bytes
        self._changed = threading.Condition()
        self.receiving = threading.BoundedSemaphore(RECEIVED_AT_ONCE)

    def take(self, wanted: int) -> int | None:
        """Takes room for a request; one that is larger than all has it alone. None: there was none in time."""
        size = min(wanted, self._most)
        with self._changed:
            if not self._changed.wait_for(lambda: self._free >= size, ROOM_SECONDS):
                return None
            self._free -= size
        return size

    def give_back(self, size: int) -> None:
        with self._changed:
            self._free += size
            self._changed.notify_all()


class RequestInterceptor(HandlerInterceptor):
    """Receives and parses requests late. The last of the interceptors. Thread-safe; `close` must be called."""

    def __init__(self, limits: ServerLimits, threads_of: Callable[[str], int]) -> None:
        super().__init__()
        self._limits = limits
        self._receptions = Receptions(threads_of)
        self._room = _Room(limits)

    def close(self) -> None:
        """Idempotent."""
        self._receptions.close()

    def _wraps(self, method: str, handler: Handler) -> bool:
        return not handler.request_streaming

    def _replacement(self, method: str, handler: Handler) -> Handler:
        behaviour, parse = behaviour_of(handler), handler.request_deserializer or bytes

        @functools.wraps(behaviour)  # keeps the attributes that grpcio reads, such as a method's own thread pool
        def answer(requests: Iterator[bytes], context: grpc.ServicerContext) -> Any:
            with self._received(method, requests, context, parse) as request:
                return behaviour(request, context)

        @functools.wraps(behaviour)
        def answers(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[Any]:
            with self._received(method, requests, context, parse) as request:
                yield from behaviour(request, context)

        if handler.response_streaming:
            return grpc.stream_stream_rpc_method_handler(answers, response_serializer=handler.response_serializer)
        return grpc.stream_unary_rpc_method_handler(answer, response_serializer=handler.response_serializer)

    @contextmanager
    def _received(
        self, method: str, requests: Iterator[bytes], context: grpc.ServicerContext, parse: Callable[[bytes], Any]
    ) -> Iterator[Any]:
        """The call's one request. Its bytes count until the call has been answered."""
        if method != PUBLISH:
            yield self._parsed(method, self._next(method, requests, context), context, parse)
            return
        taken = 0
        try:
            with self._room.receiving:
                data = self._next(method, requests, context)
                if len(data) > SMALL_BYTES:
                    room = self._room.take(len(data))
                    if room is None:
                        found = f"others publish so much that there was no room for {len(data)} bytes; try again"
                        refuse(
                            context,
                            grpc.StatusCode.RESOURCE_EXHAUSTED,
                            self._limits.refusal("publishes_bytes", found),
                        )
                    taken = room
            request = self._parsed(method, data, context, parse)
            del data
            yield request
        finally:
            if taken:
                self._room.give_back(taken)

    def _next(self, method: str, requests: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
        with self._receptions.waiting(method, context) as reception:
            try:
                return next(requests)
            except StopIteration:
                refuse(context, grpc.StatusCode.INVALID_ARGUMENT, f"{method} needs one request, and there was none")
            except grpc.RpcError:
                if reception.was_cut:
                    _LOG.info("call cut, its request did not come method=%s peer=%s", method, context.peer())
                context.abort(grpc.StatusCode.CANCELLED, "the caller left, or its request was too large or too slow")
                raise

    def _parsed(self, method: str, data: bytes, context: grpc.ServicerContext, parse: Callable[[bytes], Any]) -> Any:
        name = "publish_bytes" if method == PUBLISH else "request_bytes"
        if len(data) > getattr(self._limits, name):
            found = f"a request of {method} has {len(data)} bytes"
            refuse(context, grpc.StatusCode.RESOURCE_EXHAUSTED, self._limits.refusal(name, found))
        try:
            return parse(data)
        except DecodeError:
            refuse(
                context, grpc.StatusCode.INVALID_ARGUMENT, f"the request of {method} is not one: it cannot be parsed"
            )

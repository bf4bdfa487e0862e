"""Threads that answer calls, in turn from each host and each connection.

A call gets a thread when its request is there. Of requests that come slowly, or never, a few are received at the same
time; the slowest is refused when others wait for its place. So the requests of one kind of call that are in memory and
not yet answered are at most as many as these places and the threads together.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import grpc

from mxserver.calls.arriving import ArrivingCall

PATIENCE_SECONDS = 0.1  # for a request that others wait behind; most come with the call's headers
MOST_HELD_BYTES = 64 * 1024 * 1024
_TOO_SLOW = "the request came too slowly while others waited; try again"


class _Turns:
    """Calls that wait, taken in turn from each host, and within a host from each connection. Not thread-safe."""

    def __init__(self) -> None:
        self._hosts: OrderedDict[str, OrderedDict[str, deque[ArrivingCall]]] = OrderedDict()
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, call: ArrivingCall) -> None:
        connections = self._hosts.setdefault(call.host, OrderedDict())
        connections.setdefault(call.connection, deque()).append(call)
        self._count += 1

    def take(self) -> ArrivingCall:
        """The first call of the connection whose turn it is; that one, and its host, come last from then on."""
        host, connections = next(iter(self._hosts.items()))
        connection, calls = next(iter(connections.items()))
        call = calls.popleft()
        self._count -= 1
        if calls:
            connections.move_to_end(connection)
        else:
            del connections[connection]
        if connections:
            self._hosts.move_to_end(host)
        else:
            del self._hosts[host]
        return call


class CallPool(ThreadPoolExecutor):
    """A thread pool for grpcio's calls of one kind. Thread-safe."""

    def __init__(self, threads: int, name: str, *, receiving: int, patience_seconds: float = PATIENCE_SECONDS) -> None:
        """`receiving`: how many requests are received at the same time."""
        super().__init__(threads, name)
        self._threads_count, self._receiving_count = threads, receiving
        self._patience_seconds = patience_seconds
        self._lock = threading.Lock()
        self._waiting = _Turns()
        self._receiving: dict[ArrivingCall, float] = {}  # since when (monotonic seconds), the first one first
        self._taken = 0  # calls that are received, or have a thread, or wait for one with their request there
        self._held: dict[ArrivingCall, int] = {}  # bytes of requests that are there and not yet answered
        self._held_bytes = 0
        self._other: tuple[Callable[[bytes], bool], CallPool] | None = None
        self._timer: threading.Timer | None = None

    def hands_over(self, which: Callable[[bytes], bool], other: CallPool) -> None:
        """Calls with such requests are answered in the other pool. Call before the first call comes."""
        self._other = (which, other)

    def _take_over(self, call: ArrivingCall) -> None:
        with self._lock:
            self._waiting.add(call)
        self._go_on()

    @property
    def waiting(self) -> int:
        """Calls that nothing was done for yet."""
        return len(self._waiting)

    @property
    def unanswered(self) -> int:
        """Calls that no thread has begun to answer, and that are not being received either."""
        return len(self._waiting) + self._work_queue.qsize()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Called by grpcio for each call, in the thread that tells of events; does not wait."""
        call = None if kwargs else ArrivingCall.of(fn, args)
        if call is None:
            return super().submit(fn, *args, **kwargs)
        with self._lock:
            self._waiting.add(call)
        self._go_on()
        return call.ended

    def _go_on(self) -> None:
        """Begins to receive calls that wait, as far as there is room."""
        while (call := self._next()) is not None:
            if not call.is_there():
                self._end(call, ended=True)
            elif not call.needs_request:
                self._received(call)
            else:
                call.receive(lambda call=call: self._received(call))  # type: ignore[misc]

    def _next(self) -> ArrivingCall | None:
        with self._lock:
            if not self._waiting:
                return None
            if len(self._receiving) >= self._receiving_count:
                self._look_later()
                return None
            if self._taken >= self._threads_count + self._receiving_count or self._held_bytes >= MOST_HELD_BYTES:
                return None
            call = self._waiting.take()
            self._taken += 1
            self._receiving[call] = time.monotonic()
            return call

    def _received(self, call: ArrivingCall) -> None:
        with self._lock:
            self._receiving.pop(call, None)
            self._held[call] = len(call.request or b"")
            self._held_bytes += self._held[call]
        try:
            super().submit(self._answer, call)
        except RuntimeError:  # shut down
            self._end(call, ended=True)
            return
        self._go_on()

    def _answer(self, call: ArrivingCall) -> None:
        if self._other is not None:
            which, other = self._other
            if (request := call.request) is not None and which(request):
                self._end(call)
                other._take_over(call)
                self._go_on()
                return
        try:
            call.answer()
        finally:
            self._end(call)
            self._go_on()

    def _end(self, call: ArrivingCall, *, ended: bool = False) -> None:
        with self._lock:
            self._receiving.pop(call, None)
            self._held_bytes -= self._held.pop(call, 0)
            self._taken -= 1
        if ended:
            call.ended.set_result(None)

    def _look_later(self) -> None:
        """Has the slowest request looked at once its time is over. Called with the lock."""
        if self._timer is None:
            slowest = next(iter(self._receiving.values()))
            left = max(0.0, slowest + self._patience_seconds - time.monotonic())
            self._timer = threading.Timer(left, self._refuse_slow)
            self._timer.daemon = True
            self._timer.start()

    def _refuse_slow(self) -> None:
        """Refuses requests whose time is over, while calls wait for their places."""
        latest = time.monotonic() - self._patience_seconds
        with self._lock:
            self._timer = None
            slow = [call for call, since in self._receiving.items() if since <= latest] if self._waiting else []
        for call in slow:
            call.refuse(grpc.StatusCode.RESOURCE_EXHAUSTED, _TOO_SLOW)  # its place is free when gRPC tells of its end
        with self._lock:
            if self._waiting and len(self._receiving) >= self._receiving_count:
                self._look_later()
        self._go_on()

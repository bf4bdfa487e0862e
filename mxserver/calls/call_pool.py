"""Threads that answer calls, in turn from each host and each connection.

A call gets a thread when its request is there. Of requests that come slowly, or never, a few are received at the same
time (receiving.py). While those that are there and not yet answered have many bytes, no other is received: a large one
is alone.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from mxserver.calls.arriving import ArrivingCall
from mxserver.calls.freed_memory import LARGE_BYTES, give_back
from mxserver.calls.receiving import Receiving

MOST_HELD_BYTES = 8 * 1024 * 1024
LEAST_TAKEN = 4  # requests that come slowly, or never, leave room for others where one thread answers


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

    def __init__(self, threads: int, name: str, receiving: Receiving, most_held_bytes: int = MOST_HELD_BYTES) -> None:
        """No request is received while those that are there and not yet answered have `most_held_bytes` or more."""
        super().__init__(threads, name)
        self._most_taken, self._most_held_bytes = max(threads, LEAST_TAKEN), most_held_bytes
        self._receiving = receiving
        self._lock = threading.Lock()
        self._waiting = _Turns()
        self._waiting_slow = _Turns()  # of connections whose last request was too slow
        self._taken = 0  # calls that are received, or have a thread, or wait for one with their request there
        self._held: dict[ArrivingCall, int] = {}  # bytes of requests that are there and not yet answered
        self._held_bytes = 0
        self._other: tuple[Callable[[bytes], bool], CallPool] | None = None

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
        return len(self._waiting) + len(self._waiting_slow)

    @property
    def held_bytes(self) -> int:
        """Of requests that are there and not yet answered."""
        return self._held_bytes

    @property
    def unanswered(self) -> int:
        """Calls that no thread has begun to answer, and that are not being received either."""
        return self.waiting + self._work_queue.qsize()

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
        while self._has_room() and self._receiving.reserve(self._go_on):
            call = self._next()
            if call is None:
                self._receiving.give_back()
                return
            self._receiving.begin(call)
            if not call.is_there():
                self._end(call, ended=True)
            elif not call.needs_request:
                self._received(call)
            else:
                call.receive(lambda call=call: self._received(call))  # type: ignore[misc]

    def _has_room(self) -> bool:
        with self._lock:
            return self._may_take()

    def _may_take(self) -> bool:
        """Called with the lock."""
        return self.waiting > 0 and self._taken <= self._most_taken and self._held_bytes < self._most_held_bytes

    def _next(self) -> ArrivingCall | None:
        with self._lock:
            call = self._whose_turn() if self._may_take() else None
            self._taken += call is not None
            return call

    def _whose_turn(self) -> ArrivingCall | None:
        """Called with the lock, and with a place."""
        if self._waiting_slow and self._receiving.may_take_slow(others_wait=len(self._waiting) > 0):
            return self._waiting_slow.take()
        while self._waiting:
            call = self._waiting.take()
            if not self._receiving.is_slow(call):
                return call
            self._waiting_slow.add(call)
        if self._waiting_slow and self._receiving.may_take_slow(others_wait=False):
            return self._waiting_slow.take()
        return None

    def _received(self, call: ArrivingCall) -> None:
        with self._lock:
            self._held[call] = len(call.request or b"")
            self._held_bytes += self._held[call]
        self._receiving.end(call)
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
        self._receiving.end(call)
        with self._lock:
            held = self._held.pop(call, 0)
            self._held_bytes -= held
            self._taken -= 1
        if held >= LARGE_BYTES:
            give_back()
        if ended:
            call.ended.set_result(None)

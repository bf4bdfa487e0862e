"""How many requests are received at the same time: their sizes are not known before they are there.

Most requests come with the call's headers, and take a moment. One that is large, or slow, keeps a place; when calls
wait for places, it is refused after a short time, and later ones of its connection have one place at most. Pools that
share places share the memory too.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence

import grpc

from mxserver.calls.arriving import ArrivingCall
from mxserver.calls.freed_memory import LARGE_BYTES
from mxserver.periodic import Periodic

_TOO_SLOW = "the request came too slowly while others waited; try again"
_TOO_LARGE = "the request came too slowly while a large one was there; try again"


PATIENCE_SECONDS = 0.1  # for a request that others wait behind; most come with the call's headers
MOST_SLOW_CONNECTIONS = 1024  # that are remembered


class Receiving:
    """Places for requests that are received, shared by pools of calls. Thread-safe."""

    def __init__(self, places: int, patience_seconds: float) -> None:
        """Where others wait, a request may take `patience_seconds`."""
        self._places, self._patience_seconds = places, patience_seconds
        self._lock = threading.Lock()
        self._since: dict[ArrivingCall, float] = {}  # monotonic seconds, the first one first
        self._reserved = 0
        self._waiting: dict[Callable[[], None], None] = {}  # what to call when there is a place, the first one first
        self._timer: threading.Timer | None = None
        self._slow: OrderedDict[str, None] = OrderedDict()  # connections whose last request was refused here
        self.begun: Callable[[], None] = lambda: None
        """Called for each request that begins to be received."""

    def reserve(self, when_free: Callable[[], None]) -> bool:
        """Takes a place. Where there is none, `when_free` is called once there may be one."""
        with self._lock:
            if len(self._since) + self._reserved < self._places:
                self._reserved += 1
                return True
            self._waiting[when_free] = None
            self._look_later()
            return False

    def is_slow(self, call: ArrivingCall) -> bool:
        """Whether the last request of the call's connection was refused here."""
        return call.connection in self._slow

    def may_take_slow(self, others_wait: bool) -> bool:
        """Whether a slow connection may have the place that was reserved."""
        with self._lock:
            if self._places == 1:
                return not others_wait
            return not any(call.connection in self._slow for call in self._since)

    def begin(self, call: ArrivingCall) -> None:
        """The reserved place is this call's from now on."""
        with self._lock:
            self._reserved -= 1
            self._since[call] = time.monotonic()
        self.begun()

    def under_way(self, latest: float) -> list[tuple[float, ArrivingCall]]:
        """The requests that are not there yet of those that began by `latest`: since when, in monotonic seconds."""
        with self._lock:
            return [(since, call) for call, since in self._since.items() if since <= latest]

    def is_idle(self) -> bool:
        """Whether no request is under way."""
        return not self._since

    def refuse(self, call: ArrivingCall, reason: str) -> None:
        """Refuses a request that is not there yet. Its place is free when gRPC tells of its end."""
        call.after_events(lambda: self._refuse(call, reason))

    def give_back(self) -> None:
        """The reserved place is not needed."""
        with self._lock:
            self._reserved -= 1
        self._tell()

    def end(self, call: ArrivingCall) -> None:
        """The request is there, or does not come any more. Idempotent."""
        with self._lock:
            if self._since.pop(call, None) is None:
                return
            if call.request is not None:
                self._slow.pop(call.connection, None)
        self._tell()

    def _tell(self) -> None:
        """Offers free places to those who wait, in turn."""
        with self._lock:
            free = self._places - len(self._since) - self._reserved
            told = list(self._waiting)[: max(0, free)]
            for when_free in told:
                del self._waiting[when_free]
        for when_free in told:
            when_free()

    def _look_later(self) -> None:
        """Has the slowest request looked at once its time is over. Called with the lock."""
        if self._timer is None and self._since:
            slowest = next(iter(self._since.values()))
            left = max(0.005, slowest + self._patience_seconds - time.monotonic())
            self._timer = threading.Timer(left, self._refuse_slow)
            self._timer.daemon = True
            self._timer.start()

    def _refuse_slow(self) -> None:
        """Refuses requests whose time is over, while others wait for their places."""
        latest = time.monotonic() - self._patience_seconds
        with self._lock:
            self._timer = None
            slow = [call for call, since in self._since.items() if since <= latest] if self._waiting else []
        for call in slow:
            self.refuse(call, _TOO_SLOW)
        with self._lock:
            if self._waiting:
                self._look_later()
        self._tell()

    def _refuse(self, call: ArrivingCall, reason: str) -> None:
        """Refuses it, unless it had come by the time that it was looked at and only we had not noticed."""
        with self._lock:
            still = call in self._since
            if still:
                self._slow[call.connection] = None
                if len(self._slow) > MOST_SLOW_CONNECTIONS:
                    self._slow.popitem(last=False)
        if still:
            call.refuse(grpc.StatusCode.RESOURCE_EXHAUSTED, reason)


LOOK_SECONDS = 0.01  # between two looks at requests under way; who is honest and small needs less


class LargeRequests:
    """Has one large request at a time received, of all pools: grpcio has three copies of it when it has come.

    Nothing says before that a request is large; it takes a while. So one that takes longer than most, publishes aside,
    is refused where a publish does so as well, or a large one is being answered, or another such request was first.
    Thread-safe; `start` it, `stop` it.
    """

    def __init__(self, publishes: Receiving, others: Sequence[Receiving], held_bytes: Callable[[], int]) -> None:
        """`held_bytes`: of publishes that are there and not yet answered."""
        self._publishes, self._others, self._held_bytes = publishes, others, held_bytes
        self._ending = threading.Event()
        self._looks = Periodic("large-requests", 3600.0, self._look)
        for each in (publishes, *others):
            each.begun = self._looks.wake

    def start(self) -> None:
        """Call once."""
        self._looks.start()

    def stop(self) -> None:
        """Idempotent."""
        self._ending.set()
        self._looks.stop()

    @property
    def problem(self) -> str | None:
        """What keeps it from its work."""
        return self._looks.problem

    def _look(self) -> None:
        if self._ending.wait(LOOK_SECONDS):
            return
        latest = time.monotonic() - LOOK_SECONDS
        slow = [(since, each, call) for each in self._others for since, call in each.under_way(latest)]
        slow.sort(key=lambda one: one[0])
        is_one_there = bool(self._publishes.under_way(latest)) or self._held_bytes() >= LARGE_BYTES
        for _, receiving, call in slow if is_one_there else slow[1:]:
            receiving.refuse(call, _TOO_LARGE)
        if not all(each.is_idle() for each in (self._publishes, *self._others)):
            self._looks.wake()

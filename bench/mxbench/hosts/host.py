"""A machine of a bench as its coordinator sees it: processes that are started there, and what they say."""

from __future__ import annotations

import itertools
import json
import queue
import signal
import threading
import time
from types import TracebackType
from typing import Any, Self

from mxbench.hosts.channel import Channel
from mxbench.hosts.errors import HostError

__all__ = ["Child", "Host"]

_READY_SECONDS = 120.0
_EVENT_SECONDS = 180.0


class Child:
    """A process on a host. What it says is in order; `progress` and `lost` are collected beside that."""

    def __init__(self, host: Host, name: str, program: str) -> None:
        self.host, self.name, self.program = host, name, program
        self.progress: list[tuple[float, int]] = []  # its own clock's seconds, bytes
        self.lost: list[dict[str, Any]] = []  # which source was dropped when, and why
        self.alive = True
        self._events: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._moved = threading.Condition()

    def take(self, event: dict[str, Any]) -> None:
        """What the process said; called by the host's thread."""
        if event.get("event") == "progress":
            with self._moved:
                self.progress.append((event["at"], event["bytes"]))
                self._moved.notify_all()
            return
        if event.get("event") == "lost":
            self.lost.append(event)
            return
        if event.get("event") == "ended":
            with self._moved:
                self.alive = False
                self._moved.notify_all()
        self._events.put(event)

    def send(self, line: str) -> None:
        """A line to its stdin."""
        self.host.request(do="send", child=self.name, line=line)

    def signal(self, number: int = signal.SIGKILL) -> None:
        """Sends it a signal: SIGKILL, SIGSTOP, SIGCONT, SIGTERM."""
        self.host.request(do="signal", child=self.name, number=int(number))

    def end(self) -> None:
        """Lets it end by itself, as its input ends."""
        self.host.request(do="end", child=self.name)

    def expect(self, event: str, seconds: float = _EVENT_SECONDS) -> dict[str, Any]:
        """What it says next, which must be this event. Raises HostError."""
        until = min(seconds, max(0.0, self.host.deadline - time.monotonic()))
        try:
            told = self._events.get(timeout=until)
        except queue.Empty:
            raise HostError(f"{self._place}: no {event!r} within {until:.0f} s") from None
        if told.get("event") != event:
            raise HostError(f"{self._place}: {self._unexpected(told)} instead of {event!r}")
        return told

    def until(self, count: float, seconds: float = _EVENT_SECONDS) -> None:
        """Waits until it has told of this many bytes. Raises HostError."""
        until = min(seconds, max(0.0, self.host.deadline - time.monotonic()))
        with self._moved:
            there = self._moved.wait_for(lambda: self._has(count) or not self.alive, timeout=until)
            if not there or not self._has(count):
                raise HostError(f"{self._place}: it had not {count:.0f} bytes within {until:.0f} s")

    def _has(self, count: float) -> bool:
        return bool(self.progress) and self.progress[-1][1] >= count

    @property
    def _place(self) -> str:
        return f"{self.program} on {self.host.name}"

    @staticmethod
    def _unexpected(told: dict[str, Any]) -> str:
        if told.get("event") == "ended":
            lines = str(told.get("log", "")).strip().splitlines()
            return f"it ended with {told['status']} ({lines[-1] if lines else 'without a word'})"
        return str(told.get("why") or told)


class Host:
    """A machine: its name, the address at which others reach it, the processes there. Ends them with the context."""

    def __init__(self, name: str, address: str, channel: Channel) -> None:
        """Waits for the agent. Raises HostError."""
        self.name, self.address = name, address
        self.deadline = float("inf")  # of every wait, as time.monotonic()
        self._channel = channel
        self._children: dict[str, Child] = {}
        self._numbers = itertools.count()
        self._answers: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._reading = threading.Thread(target=self._read, name=f"mx-bench-{name}", daemon=True)
        self._reading.start()
        try:
            self._answer(_READY_SECONDS)
        except HostError:
            self.close()
            raise

    def _read(self) -> None:
        for told in self._channel.told():
            child = self._children.get(str(told.get("child", "")))
            if child is not None and "event" in told:
                child.take(told["event"])
            elif child is not None and "refused" in told:
                child.take({"event": "refused", "why": told["refused"]})
            else:
                self._answers.put(told)
        for child in list(self._children.values()):
            child.take({"event": "ended", "status": None, "log": f"the connection to {self.name} is lost"})
        self._answers.put(None)

    def _answer(self, seconds: float) -> dict[str, Any]:
        try:
            told = self._answers.get(timeout=seconds)
        except queue.Empty:
            raise HostError(f"{self.name}: its agent says nothing within {seconds:.0f} s") from None
        if told is None:
            said = self._channel.close()
            raise HostError(f"{self.name}: no agent answers there{f': {said}' if said else ''}")
        if "refused" in told:
            raise HostError(f"{self.name}: {told['refused']}")
        return told

    def request(self, **told: Any) -> None:
        """Raises HostError when the agent is gone."""
        try:
            self._channel.send(**told)
        except HostError as error:
            raise HostError(f"{self.name}: {error}") from error

    def machine(self) -> dict[str, Any]:
        """What it is. Raises HostError."""
        self.request(do="describe")
        found: dict[str, Any] = self._answer(_READY_SECONDS)["machine"]
        return found

    def spawn(self, program: str, task: dict[str, Any], environ: dict[str, str] | None = None) -> Child:
        """Starts one of the agent's programs. Raises HostError."""
        child = Child(self, f"{program}-{next(self._numbers)}", program)
        self._children[child.name] = child
        json.dumps(task)  # a mistake of ours is seen here
        self.request(do="spawn", child=child.name, program=program, task=task, environ=environ or {})
        return child

    def close(self) -> None:
        """Ends all processes there and the connection. Idempotent."""
        self._channel.close()
        self._reading.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

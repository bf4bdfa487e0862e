"""What the server is told about a load: how far it is while it runs, and how it went once it is done.

It feeds the status page and metrics; nothing depends on it. Messages go out on a thread of their own, about one a
second, and fewer where the server says so, as many load, or is slow to answer. What cannot be sent is dropped; no load
waits or fails for it.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from mxserver.wire import StaleEpoch, WireError
from mxserver.wire.proto import load_pb2

__all__ = ["LoadPath", "LoadReporter", "LoadStep", "Progress", "peer_path"]

logger = logging.getLogger(__name__)

FIRST_SECONDS = 0.5  # most loads of small models are over by then, and send no message
INTERVAL_SECONDS = 1.0
CALL_SHARE = 0.02  # of the time may go into calls: thousands that load at once slow down together
LONGEST_INTERVAL_SECONDS = 30.0
_JOIN_SECONDS = 2.0
_NAMED_WHILE_RUNNING = 8
_NAMED_AT_THE_END = 16

LoadPath: TypeAlias = load_pb2.LoadPath.ValueType

_PEER_PATHS: dict[str, LoadPath] = {
    "same-host": load_pb2.LOAD_PATH_PEER_SAME_HOST,
    "cuda-ipc": load_pb2.LOAD_PATH_PEER_SAME_HOST,
    "tcp": load_pb2.LOAD_PATH_PEER_TCP,
    "rdma": load_pb2.LOAD_PATH_PEER_RDMA,
}


def peer_path(transport: str) -> LoadPath:
    """The path by which a route's transport is reported."""
    return _PEER_PATHS.get(transport, load_pb2.LOAD_PATH_UNSPECIFIED)


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a load is, in bytes; from whom, and how many give at the moment (0 and empty: not from workers).

    `given`: bytes by the worker that gave them.
    """

    path: LoadPath
    bytes_done: int
    bytes_total: int
    from_worker_id: str = ""
    holders: int = 0
    given: Mapping[str, int] = field(default_factory=dict)


class LoadStep:
    """One attempt to load from one place: call it with (bytes done, bytes in all), as often as you like, on any thread.

    `progress` may be replaced by a function that is asked instead, once a message. `ended` reports a finished load.
    """

    def __init__(self, path: LoadPath) -> None:
        self._now = Progress(path, 0, 0)
        self.progress: Callable[[], Progress] = lambda: self._now
        self.chunks_verified = 0
        self.started = time.monotonic()
        self.seconds: float | None = None

    def __call__(self, bytes_done: int, bytes_total: int) -> None:
        self._now = Progress(self._now.path, bytes_done, bytes_total)

    def ended(
        self,
        path: LoadPath,
        bytes_loaded: int,
        seconds: float,
        from_worker_id: str = "",
        chunks_verified: int = 0,
        given: Mapping[str, int] | None = None,
    ) -> None:
        """Reports the whole load, once it is done. `given`: bytes by the worker that gave them."""
        self._now = Progress(path, bytes_loaded, bytes_loaded, from_worker_id, given=given or {})
        self.progress = lambda: self._now
        self.seconds = seconds
        self.chunks_verified = chunks_verified


class LoadReporter:
    """The loads of one worker, one after the other. Thread-safe; `close` ends its thread."""

    def __init__(self, send: Callable[[load_pb2.LoadProgress], float]) -> None:
        """`send` returns the seconds until the next message is wanted, at least. It may raise WireError, and may take
        its time; it is called on a thread of this object.
        """
        self._send = send
        self._changed = threading.Condition()
        self._load_id = ""
        self._step: LoadStep | None = None
        self._fallbacks: list[load_pb2.Fallback] = []
        self._report: load_pb2.LoadReport | None = None
        self._began: float | None = time.monotonic()  # the load: this worker came to be, or began another load
        self._ended = 0.0  # the step that loaded
        self._timed = False  # whether the report has the seconds of processing
        self._thread: threading.Thread | None = None
        self._closed = False

    @contextlib.contextmanager
    def loading(self, path: LoadPath) -> Iterator[LoadStep]:
        """Around one step of a load. An exception that leaves it is reported as the reason why the step failed.

        A step after one that failed belongs to the same load.
        """
        step = LoadStep(path)
        with self._changed:
            if self._report is not None or not self._load_id:
                self._load_id, self._fallbacks = uuid.uuid4().hex, []
            if self._began is None:
                self._began = step.started
            self._report = None
            self._step = step
            self._start()
            self._changed.notify_all()
        try:
            yield step
        except BaseException as error:
            self._leave(step, f"{type(error).__name__}: {error}")
            raise
        self._leave(step, None)

    def report(self) -> load_pb2.LoadReport | None:
        """How the last load went, until `reported` says that the server knows; None while there is nothing to tell."""
        with self._changed:
            if self._report is not None and not self._timed:
                self._report.process_seconds = time.monotonic() - self._ended
                self._timed = True
            return self._report

    def took(self, transfer_seconds: float, process_seconds: float) -> None:
        """The parts of the load that has just ended, as its engine measured them; the rest of its time was waiting.

        Unless told, the transfer is the step that loaded, and what follows it until the report is processing.
        """
        with self._changed:
            if self._report is None or self._began is None:
                return
            whole = time.monotonic() - self._began
            self._report.transfer_seconds, self._report.process_seconds = transfer_seconds, process_seconds
            self._report.wait_seconds = max(0.0, whole - transfer_seconds - process_seconds)
            self._timed = True

    def reported(self, report: load_pb2.LoadReport) -> None:
        """The server has received this report."""
        with self._changed:
            if self._report is report:
                self._report, self._load_id, self._began = None, "", None

    def take_over(self, other: LoadReporter) -> None:
        """Takes over the report of a load that ran under another membership of this process."""
        with other._changed:
            load_id, report, fallbacks = other._load_id, other._report, other._fallbacks
            times = other._began, other._ended, other._timed
            other._load_id, other._report, other._fallbacks = "", None, []
        with self._changed:
            self._load_id, self._report, self._fallbacks = load_id, report, fallbacks
            self._began, self._ended, self._timed = times

    def close(self) -> None:
        """Nothing is sent from now on, but for a call that is running. Idempotent."""
        with self._changed:
            self._closed = True
            self._step = None
            self._changed.notify_all()
            thread = self._thread
        if thread is not None:
            thread.join(_JOIN_SECONDS)

    def _leave(self, step: LoadStep, failure: str | None) -> None:
        """Never raises, whatever the caller's `progress` does."""
        try:
            last = step.progress()
        except Exception:
            logger.debug("the load's progress is unknown", exc_info=True)
            last = Progress(load_pb2.LOAD_PATH_UNSPECIFIED, 0, 0)
        with self._changed:
            if self._step is step:
                self._step = None
            if failure is not None:
                self._fallbacks.append(load_pb2.Fallback(path=last.path, reason=failure))
                return
            self._ended, self._timed = time.monotonic(), False
            seconds = self._ended - step.started if step.seconds is None else step.seconds
            began = step.started if self._began is None else self._began
            self._report = load_pb2.LoadReport(
                load_id=self._load_id,
                path=last.path,
                bytes=last.bytes_done,
                seconds=seconds,
                from_worker_id=last.from_worker_id,
                chunks_verified=step.chunks_verified,
                fallbacks=self._fallbacks,
                wait_seconds=max(0.0, self._ended - began - seconds),
                transfer_seconds=seconds,
                given=_most(last.given, _NAMED_AT_THE_END),
                givers=len(last.given),
                bytes_from_workers=sum(last.given.values()),
            )

    def _start(self) -> None:
        if self._thread is None and not self._closed:
            self._thread = threading.Thread(target=self._run, name="mx-load-progress", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        told: LoadStep | None = None
        pause = FIRST_SECONDS
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._step is not None)
                step, load_id = self._step, self._load_id
                if self._closed or step is None:
                    return
                if step is not told:
                    told, pause = step, FIRST_SECONDS
                until = time.monotonic() + pause
                while self._step is step and (left := until - time.monotonic()) > 0:
                    self._changed.wait(left)
                if self._step is not step:
                    continue
            pause = self._tell(step, load_id, pause)

    def _tell(self, step: LoadStep, load_id: str, pause: float) -> float:
        """Sends one message; returns the seconds until the next one."""
        started = time.monotonic()
        try:
            now = step.progress()
            wanted_seconds = self._send(
                load_pb2.LoadProgress(
                    load_id=load_id,
                    path=now.path,
                    bytes_done=now.bytes_done,
                    bytes_total=now.bytes_total,
                    from_worker_id=now.from_worker_id,
                    holders=now.holders,
                    given=_most(now.given, _NAMED_WHILE_RUNNING),
                )
            )
        except StaleEpoch:
            return LONGEST_INTERVAL_SECONDS  # the heartbeat notices it too, and acts
        except WireError as error:
            logger.debug("progress was not taken: %s", error)
            return min(2 * max(pause, INTERVAL_SECONDS), LONGEST_INTERVAL_SECONDS)
        except Exception:
            logger.debug("progress could not be told", exc_info=True)
            return LONGEST_INTERVAL_SECONDS
        took = time.monotonic() - started
        return min(max(INTERVAL_SECONDS, took / CALL_SHARE, wanted_seconds), LONGEST_INTERVAL_SECONDS)


def _most(given: Mapping[str, int], most: int) -> list[load_pb2.GivenBytes]:
    """Those that gave most, first."""
    named = sorted(given, key=lambda worker: (-given[worker], worker))[:most]
    return [load_pb2.GivenBytes(worker_id=worker, bytes=given[worker]) for worker in named]

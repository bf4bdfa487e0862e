"""The loads that workers report: running ones, with rate and time left, and the last that have ended.

Running ones are in memory: after a restart, or on another replica, workers' next reports fill it again. Of those that
have ended see load_history.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from mxserver.store import Clock, RecordKey, Status
from mxserver.telemetry.events import Events, bounded
from mxserver.telemetry.load_history import LONGEST_NAME, MAX_GIVERS, FinishedLoad, LoadHistory
from mxserver.telemetry.metrics import Metrics, path_label
from mxserver.telemetry.refusals import Refusals
from mxserver.wire.proto import load_pb2, p2p_pb2, record_pb2

RATE_WINDOW_SECONDS = 10.0
PROGRESS_A_SECOND = 20
"""Messages of all loads together; of a few loads, each tells once a second."""
SHOWN_FINISHED = 30
REMEMBERED_LOAD_IDS = 100_000

_STALE = p2p_pb2.SOURCE_STATUS_STALE
_READY = p2p_pb2.SOURCE_STATUS_READY
_NOWHERE = record_pb2.WorkerFacts()


class Given(NamedTuple):
    """What one worker has given a load that runs, and its rate between the last two reports, if there were two."""

    worker_id: str
    bytes: int
    bytes_per_second: float | None


@dataclass(frozen=True, slots=True)
class RunningLoad:
    """A load at one moment. Rate and time left are None until there are two reports. `given`: of who gave most."""

    key: RecordKey
    path: str
    bytes_done: int
    bytes_total: int
    from_worker_id: str
    holders: int
    bytes_per_second: float | None
    eta_seconds: float | None
    running_seconds: float
    silent_seconds: float
    given: tuple[Given, ...] = ()


@dataclass(slots=True)
class _Running:
    load_id: str
    started: float
    progress: load_pb2.LoadProgress
    heard: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=32))  # (monotonic s, bytes done)
    given: Mapping[str, int] = field(default_factory=dict)  # by the last report
    given_before: Mapping[str, int] | None = None  # by the one before

    def tell(self, now: float, progress: load_pb2.LoadProgress) -> None:
        self.progress = progress
        self.given_before = self.given if self.heard else None
        self.given = {bounded(one.worker_id, LONGEST_NAME): one.bytes for one in progress.given[:MAX_GIVERS]}
        self.heard.append((now, progress.bytes_done))

    def rate(self) -> float | None:
        """Bytes a second over the window that ends with the last report, or since the one before that."""
        last_time, last_bytes = self.heard[-1]
        first_time, first_bytes = next(h for h in self.heard if h[0] >= last_time - RATE_WINDOW_SECONDS)
        if first_time == last_time and len(self.heard) > 1:  # of many loads, each tells less often
            first_time, first_bytes = self.heard[-2]
        if last_time <= first_time:
            return None
        return max(0.0, (last_bytes - first_bytes) / (last_time - first_time))

    def givers(self) -> tuple[Given, ...]:
        """Those that gave most, first."""
        before = self.given_before
        seconds = self.heard[-1][0] - self.heard[-2][0] if before is not None else 0.0

        def rate(worker: str, given: int) -> float | None:
            return max(0, given - before.get(worker, 0)) / seconds if before is not None and seconds > 0 else None

        return tuple(Given(worker, given, rate(worker, given)) for worker, given in self.given.items())


class Loads:
    """What workers report. Thread-safe. The caller has checked that the record is known and its epoch is right."""

    def __init__(
        self,
        metrics: Metrics,
        events: Events,
        clock: Clock,
        *,
        forget_seconds: float,
        refusals: Refusals | None = None,
        history: LoadHistory | None = None,
    ) -> None:
        """A load without a report for `forget_seconds` is no longer shown. `history` gets those that have ended."""
        self.history = history or LoadHistory()
        self._refusals = refusals or Refusals(metrics, events, clock)
        self._metrics = metrics
        self._events = events
        self._clock = clock
        self._forget_seconds = forget_seconds
        self._lock = threading.Lock()
        self._running: dict[RecordKey, _Running] = {}
        self._counted: OrderedDict[str, None] = OrderedDict()  # load ids, oldest first
        for model in self.history.models():  # what was shared before a restart counts as shared
            last = next((one for one in self.history.of(model) if one.path.startswith("peer_")), None)
            if last is not None:
                self._refusals.shared(model, max(0.0, (clock.unix_ms() - last.at_ms) / 1000))

    def published(self, key: RecordKey, request: record_pb2.PublishRequest) -> None:
        """Takes the load report in a worker's publish request."""
        if request.HasField("load_report"):
            self._finish(key, request.load_report, request.identity.model_name, request.worker)

    def updated(
        self,
        key: RecordKey,
        request: p2p_pb2.UpdateStatusRequest,
        model_name: str = "",
        worker: record_pb2.WorkerFacts = _NOWHERE,
    ) -> None:
        """Takes the load report, progress and refusals in a status update; `worker` is what it has published."""
        status: Status = request.status
        if request.refusals:
            self._refusals.told(key, request.refusals, model_name)
        if request.HasField("load_report"):
            self._finish(key, request.load_report, model_name, worker)
        if request.HasField("load_progress") and status != _STALE:
            self.told(key, request.load_progress)
        elif status in (_READY, _STALE):
            with self._lock:
                self._running.pop(key, None)

    def running(self) -> list[RunningLoad]:
        """The running loads, the longest-running first."""
        with self._lock:
            now = self._clock.monotonic_seconds()
            self._forget_silent(now)
            shown = [_shown(key, load, now) for key, load in self._running.items()]
        return sorted(shown, key=lambda load: -load.running_seconds)

    def running_count(self) -> int:
        with self._lock:
            self._forget_silent(self._clock.monotonic_seconds())
            return len(self._running)

    def finished(self) -> list[FinishedLoad]:
        """The last loads of all models, newest first."""
        return self.history.newest(SHOWN_FINISHED)

    def told(self, key: RecordKey, progress: load_pb2.LoadProgress) -> float:
        """Takes a worker's progress; returns after how many seconds its next one is wanted.

        It is ignored for a load that was already reported as ended.
        """
        now = self._clock.monotonic_seconds()
        with self._lock:
            if progress.load_id not in self._counted:
                load = self._running.get(key)
                if load is None or load.load_id != progress.load_id:
                    load = self._running[key] = _Running(progress.load_id, now, progress)
                load.tell(now, progress)
            return max(1.0, len(self._running) / PROGRESS_A_SECOND)

    def _finish(
        self, key: RecordKey, report: load_pb2.LoadReport, model_name: str, worker: record_pb2.WorkerFacts
    ) -> None:
        with self._lock:
            self._running.pop(key, None)
            if report.load_id:
                if report.load_id in self._counted:
                    return  # a repeated call: counted already
                self._counted[report.load_id] = None
            while len(self._counted) > REMEMBERED_LOAD_IDS:
                self._counted.popitem(last=False)
        load = self.history.add(
            load_pb2.KeptLoad(
                mx_source_id=key.source_id,
                worker_id=key.worker_id,
                worker_rank=key.worker_rank,
                model_name=model_name,
                at_unix_ms=self._clock.unix_ms(),
                pod_name=worker.pod_name,
                node_name=worker.node_name,
                replica=worker.replica,
                report=report,
            )
        )
        if load.path.startswith("peer_"):
            self._refusals.shared(load.model_name)
        self._metrics.loads.labels(load.path).inc()
        self._metrics.load_bytes.labels(load.path).inc(load.bytes)
        self._metrics.load_seconds.labels(load.path).observe(load.seconds)
        self._metrics.models.finished(load.model_name, load.path, load.bytes, load.seconds)
        self._metrics.chunks_verified.inc(load.chunks_verified)
        for fallback, text in zip(report.fallbacks, load.fallbacks, strict=False):
            self._metrics.load_fallbacks.labels(path_label(fallback.path)).inc()
            self._events.add("fallback", f"worker {key.worker_id}, rank {key.worker_rank} left {text}")

    def _forget_silent(self, now: float) -> None:
        silent = [key for key, load in self._running.items() if now - load.heard[-1][0] > self._forget_seconds]
        for key in silent:
            del self._running[key]


def _shown(key: RecordKey, load: _Running, now: float) -> RunningLoad:
    progress = load.progress
    rate = load.rate()
    left = max(0, progress.bytes_total - progress.bytes_done)
    return RunningLoad(
        key=key,
        path=path_label(progress.path),
        bytes_done=progress.bytes_done,
        bytes_total=progress.bytes_total,
        from_worker_id=bounded(progress.from_worker_id, LONGEST_NAME),
        holders=progress.holders,
        bytes_per_second=rate,
        eta_seconds=left / rate if rate else None,
        running_seconds=now - load.started,
        silent_seconds=now - load.heard[-1][0],
        given=load.givers(),
    )

"""Doubts about weights that workers told lately: a short list in memory, a metric, and a line among the events."""

from __future__ import annotations

import threading
from collections import deque

from mxserver.store import Clock
from mxserver.telemetry.events import Events, bounded
from mxserver.telemetry.metrics import DOUBTS, Metrics
from mxserver.wire.proto import mx_pb2

KEPT_DOUBTS = 64
MOST_HOLDERS = 8
LONGEST_NAME = 256
LONGEST_TEXT = 500


class Doubts:
    """What workers told. Thread-safe. After a restart, or on another replica, there is nothing."""

    def __init__(self, metrics: Metrics, events: Events, clock: Clock) -> None:
        self._metrics = metrics
        self._events = events
        self._clock = clock
        self._lock = threading.Lock()
        self._kept: deque[mx_pb2.Doubt] = deque(maxlen=KEPT_DOUBTS)

    def told(self, doubt: mx_pb2.Doubt) -> None:
        """Keeps a doubt, its texts cut to their limits, under the time of this server."""
        kept = mx_pb2.Doubt(
            kind=doubt.kind if doubt.kind in DOUBTS else mx_pb2.DOUBT_KIND_UNSPECIFIED,
            mx_source_id=bounded(doubt.mx_source_id, LONGEST_NAME),
            worker_rank=doubt.worker_rank,
            worker_id=bounded(doubt.worker_id, LONGEST_NAME),
            holders=[bounded(holder, LONGEST_NAME) for holder in doubt.holders[:MOST_HOLDERS]],
            chunks=doubt.chunks,
            text=bounded(doubt.text, LONGEST_TEXT),
            at_unix_ms=self._clock.unix_ms(),
        )
        with self._lock:
            self._kept.appendleft(kept)
        kind = DOUBTS.get(kept.kind, "unknown")
        self._metrics.doubts.labels(kind).inc()
        self._events.add("doubt", f"worker {kept.worker_id}, rank {kept.worker_rank}, {kind}: {kept.text}")

    def newest(self, source_id: str = "") -> list[mx_pb2.Doubt]:
        """The last ones, newest first; with a source id, of those weights alone."""
        with self._lock:
            return [doubt for doubt in self._kept if source_id in ("", doubt.mx_source_id)]

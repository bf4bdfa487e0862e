"""Weights that workers do not share, and why: counted by reason, for each source id, and told where nothing is shared.

A fleet in which every worker is READY and every one of them has read storage looks well everywhere else.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field

from mxserver.store import Clock, RecordKey
from mxserver.telemetry.events import Events, bounded
from mxserver.telemetry.metrics import REASONS, SIDES, UNKNOWN, Metrics
from mxserver.wire.proto import load_pb2

WINDOW_SECONDS = 3600.0
KEPT_SOURCES = 1000
REMEMBERED_IDS = 100_000
MOST_AT_ONCE = 32
LONGEST_NAME = 256
LONGEST_TEXT = 500


@dataclass(slots=True)
class _Source:
    """What is known of one source id; times are monotonic seconds."""

    model_name: str = ""
    refused_at: float = float("-inf")
    counts: dict[tuple[int, int], load_pb2.RefusalCount] = field(default_factory=dict)


class Refusals:
    """What workers told. Thread-safe. In memory: after a restart, or on another replica, there is nothing."""

    def __init__(self, metrics: Metrics, events: Events, clock: Clock) -> None:
        self._metrics = metrics
        self._events = events
        self._clock = clock
        self._lock = threading.Lock()
        self._sources: OrderedDict[str, _Source] = OrderedDict()  # the one that was told of last at the end
        self._shared: OrderedDict[str, float] = OrderedDict()  # model names in lower case → when a worker got weights
        self._ids: OrderedDict[str, None] = OrderedDict()

    def told(self, key: RecordKey, refusals: Iterable[load_pb2.Refusal], model_name: str) -> None:
        """Counts what a worker told; of one call at most 32, a repeated one not again."""
        for refusal, _ in zip(refusals, range(MOST_AT_ONCE), strict=False):
            known = bounded(refusal.id, LONGEST_NAME)
            with self._lock:
                if known and known in self._ids:
                    continue
                self._ids[known] = None
                while len(self._ids) > REMEMBERED_IDS:
                    self._ids.popitem(last=False)
                count = self._counted(key, refusal, model_name)
                side, reason = SIDES.get(count.side, UNKNOWN), REASONS.get(count.reason, UNKNOWN)
            self._metrics.refusals.labels(side, reason).inc()
            if refusal.side == load_pb2.REFUSAL_SIDE_OFFER:  # of the others the load's report tells
                who = f"worker {key.worker_id}, rank {key.worker_rank}"
                self._events.add("refusal", f"{who} does not offer its weights, {reason}: {count.text}")

    def _counted(self, key: RecordKey, refusal: load_pb2.Refusal, model_name: str) -> load_pb2.RefusalCount:
        source_id = bounded(key.source_id, LONGEST_NAME)
        source = self._sources.setdefault(source_id, _Source())
        self._sources.move_to_end(source_id)
        while len(self._sources) > KEPT_SOURCES:
            self._sources.popitem(last=False)
        source.model_name = bounded(model_name, LONGEST_NAME) or source.model_name
        source.refused_at = self._clock.monotonic_seconds()
        side = refusal.side if refusal.side in SIDES else load_pb2.REFUSAL_SIDE_UNSPECIFIED
        reason = refusal.reason if refusal.reason in REASONS else load_pb2.REFUSAL_REASON_UNSPECIFIED
        count = source.counts.setdefault((side, reason), load_pb2.RefusalCount(side=side, reason=reason))
        count.mx_source_id, count.model_name = source_id, source.model_name
        count.count += 1
        count.text, count.worker_id = bounded(refusal.text, LONGEST_TEXT), bounded(key.worker_id, LONGEST_NAME)
        count.at_unix_ms = self._clock.unix_ms()
        return count

    def shared(self, model_name: str, ago_seconds: float = 0.0) -> None:
        """A worker has loaded this model from other workers, so long ago."""
        name = bounded(model_name, LONGEST_NAME).lower()
        with self._lock:
            self._shared[name] = self._clock.monotonic_seconds() - ago_seconds
            self._shared.move_to_end(name)
            while len(self._shared) > KEPT_SOURCES:
                self._shared.popitem(last=False)

    def newest(self, source_id: str = "") -> list[load_pb2.RefusalCount]:
        """All counts, the newest first; with a source id, of those weights alone."""
        found: list[load_pb2.RefusalCount] = []
        with self._lock:
            for name, source in self._sources.items():
                if source_id in ("", name):
                    for count in source.counts.values():
                        found.append(load_pb2.RefusalCount())
                        found[-1].CopyFrom(count)
        return sorted(found, key=lambda count: -count.at_unix_ms)

    def not_shared(self) -> list[str]:
        """Models of which weights were refused within the last hour while no worker got any from another, sorted."""
        with self._lock:
            since = self._clock.monotonic_seconds() - WINDOW_SECONDS
            refused = {source.model_name for source in self._sources.values() if source.refused_at >= since}
            return sorted(name for name in refused if name and self._shared.get(name.lower(), float("-inf")) < since)

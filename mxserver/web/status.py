"""The server's state as plain data: the status page shows it, `/status` has it as JSON, scrapes count it.

It has sums of all models, and details of those that are asked for. What is left out of a list is counted beside it.
Nothing in it is secret: no tokens, no store address with its password, no memory addresses of workers.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mxserver import __version__
from mxserver.store import Clock, Query, SourceRecord, SourceStore, StoreUnavailable
from mxserver.telemetry import (
    DOUBTS,
    REASONS,
    SIDES,
    STATES,
    Doubts,
    Events,
    FinishedLoad,
    Loads,
    Observation,
    Refusals,
    WorkersOfModels,
)
from mxserver.web.cache_view import CacheView
from mxserver.web.models_view import Fleet, Histories, Model, Models, StatusQuery, running_as_json
from mxserver.web.replicas import NamesOfRecords
from mxserver.wire.proto import load_pb2, mx_pb2, p2p_pb2

Json = dict[str, Any]

SHOWN_MODELS = 200
SHOWN_DETAILS = 8
SHOWN_REFUSALS = 100

_OTHER_CODES = {"memory_moves": "layout_unsupported"}  # reasons that have not the name of their error
_DOUBT_CODES: dict[mx_pb2.DoubtKind.ValueType, str] = {
    mx_pb2.DOUBT_KIND_OWN_MEMORY: "MX_MEMORY_DAMAGED",
    mx_pb2.DOUBT_KIND_WRONG_CHUNKS: "MX_DIGEST_MISMATCH",
    mx_pb2.DOUBT_KIND_HOLDERS_DIFFER: "MX_DIGEST_MISMATCH",
}

# Probes, scrapes and open pages share one read of the store in this time.
LOOK_SECONDS = 1.0


@dataclass
class _Look:
    taken_at: float
    records: list[SourceRecord] | None  # None: the store does not work
    fleet: Fleet | None = None  # made when somebody looks at the page: scrapes do without


class StatusView:
    """Reads store, loads and events together. Thread-safe."""

    def __init__(
        self,
        store: SourceStore,
        loads: Loads,
        events: Events,
        clock: Clock,
        *,
        not_ready: Callable[[], str | None],
        facts: Json,
        cache: CacheView | None = None,
        refusals: Refusals | None = None,
        doubts: Doubts | None = None,
    ) -> None:
        """`not_ready` says why the server is not ready, or None; `facts` are shown about the server as they are."""
        self._store = store
        self._loads = loads
        self._events = events
        self._clock = clock
        self._not_ready = not_ready
        self._facts = facts
        self._cache = cache
        self._refusals = refusals
        self._doubts = doubts
        self._histories = Histories(loads.history)
        self._names = NamesOfRecords()
        self._started = time.monotonic()
        self._looking = threading.Lock()
        self._look: _Look | None = None

    def observation(self) -> Observation:
        """For a scrape."""
        look = self._current_look()
        ready = self._not_ready() is None
        cache = self._cache.observation() if self._cache else None
        not_shared = len(self._refusals.not_shared()) if self._refusals else 0
        if look.records is None:
            return Observation(ready, None, None, self._loads.running_count(), cache, not_shared)
        sources = Counter(STATES[record.status] for record in look.records if record.status in STATES)
        models = {r.model_name.lower() for r in look.records if r.status == p2p_pb2.SOURCE_STATUS_READY}
        return Observation(ready, sources, len(models), self._loads.running_count(), cache, not_shared)

    def workers_of_models(self) -> WorkersOfModels | None:
        """For a scrape; None while the store does not work. Names that differ in capitals are one model."""
        records = self._current_look().records
        if records is None:
            return None
        names: dict[str, str] = {}
        found: dict[str, Counter[str]] = {}
        for record in records:
            if record.status in STATES:
                name = names.setdefault(record.model_name.lower(), record.model_name)
                found.setdefault(name, Counter())[STATES[record.status]] += 1
        return found

    def as_json(self, query: StatusQuery | None = None) -> Json:
        """The status. Times are Unix ms, durations seconds; `models` is null while the store does not work.

        `totals` are of everything; `models` of those that the search finds; `details`, by the model's name in lower
        case, of those that are asked for, the first SHOWN_DETAILS.
        """
        query = query or StatusQuery()
        look = self._current_look()
        reason = self._not_ready()
        now_ms = self._clock.unix_ms()
        running = self._loads.running()
        models = Models(self._fleet_of(look), running, self._histories.all())
        found = models.found(query.search)
        shown = _most_lively(found, SHOWN_MODELS)
        asked = models.asked(query)
        refusals = self._refusals.newest() if self._refusals else []
        return {
            "server": {
                "version": __version__,
                "now_ms": now_ms,
                "uptime_seconds": int(time.monotonic() - self._started),
                "ready": reason is None,
                "reason": reason or "",
                **self._facts,
            },
            "totals": _totals(look.records or [], models, len(running), now_ms),
            "models": None if look.records is None else [found[key].as_json(now_ms) for key in shown],
            "models_total": len(found),
            "details": {key: models.details(key, query, now_ms) for key in asked[:SHOWN_DETAILS]}
            if look.records is not None
            else {},
            "loads": [
                running_as_json(load, models.model_name(load), *models.names_of(load))
                for load in running[: query.loads]
            ],
            "finished_loads": [_finished(load) for load in self._loads.finished()] if query.loads else [],
            "left_out": {
                "models": len(found) - len(shown),
                "details": asked[SHOWN_DETAILS:],
                "loads": max(0, len(running) - query.loads),
                "refusals": max(0, len(refusals) - SHOWN_REFUSALS),
            },
            "refusals": [_refusal(count) for count in refusals[:SHOWN_REFUSALS]],
            "not_shared": self._refusals.not_shared() if self._refusals else [],
            "doubts": [_doubt(doubt) for doubt in self._doubts.newest()] if self._doubts else [],
            "downloads": self._cache.downloads() if self._cache else [],
            "cache": self._cache.as_json() if self._cache else None,
            "errors": [
                {"at_ms": event.at_ms, "kind": event.kind, "text": event.text, "count": event.count}
                for event in self._events.newest()
            ],
        }

    def _current_look(self) -> _Look:
        with self._looking:
            look = self._look
            if look is None or time.monotonic() - look.taken_at > LOOK_SECONDS:
                look = self._look = self._take_look()
            return look

    def _take_look(self) -> _Look:
        try:
            records = self._store.find(Query())
        except StoreUnavailable:
            return _Look(time.monotonic(), None)  # readiness says why
        return _Look(time.monotonic(), records)

    def _fleet_of(self, look: _Look) -> Fleet:
        with self._looking:
            if look.fleet is None:
                records = look.records or []
                look.fleet = Fleet(records, self._names.of(records))
            return look.fleet


def _totals(records: list[SourceRecord], models: Models, loads_running: int, now_ms: int) -> Json:
    states = Counter(STATES[record.status] for record in records if record.status in STATES)
    of_replicas = [model.as_json(now_ms) for model in models.all()]
    return {
        "models": models.of_workers(),
        "workers": len(records),
        **{state: states.get(state, 0) for state in STATES.values()},
        "replicas_ready": sum(model["replicas"]["ready"] for model in of_replicas),
        "replicas_wanted": sum(model["replicas"]["wanted"] for model in of_replicas),
        "loads_running": loads_running,
        "loads_kept": sum(model["history"]["loads"] for model in of_replicas),
        "bytes": sum(model["history"]["bytes"] for model in of_replicas),
        "bytes_from_workers": sum(model["history"]["bytes_from_workers"] for model in of_replicas),
    }


def _most_lively(models: dict[str, Model], most: int) -> list[str]:
    """Of more than are shown those that load, then those with most workers; in the order that they have."""
    if len(models) <= most:
        return list(models)

    def workers(key: str) -> int:
        return sum(map(len, models[key].sources.values()))

    chosen = set(sorted(models, key=lambda key: (-len(models[key].running), -workers(key), key))[:most])
    return [key for key in models if key in chosen]


def _finished(load: FinishedLoad) -> Json:
    return {
        "model_name": load.model_name,
        "source_id": load.key.source_id,
        "worker_id": load.key.worker_id,
        "worker_rank": load.key.worker_rank,
        "replica": load.replica,
        "pod": load.pod_name,
        "node": load.node_name,
        "at_ms": load.at_ms,
        "path": load.path,
        "bytes": load.bytes,
        "bytes_from_workers": load.bytes_from_workers,
        "seconds": load.seconds,
        "wait_seconds": load.wait_seconds,
        "transfer_seconds": load.transfer_seconds,
        "process_seconds": load.process_seconds,
        "from_worker_id": load.from_worker_id,
        "given": [{"worker_id": worker, "bytes": given} for worker, given in load.given],
        "givers": load.givers,
        "chunks_verified": load.chunks_verified,
        "fallbacks": list(load.fallbacks),
    }


def _code(reason: str) -> str:
    """The error code of a reason of a refusal; empty where it has none."""
    return "" if reason in ("", "other") else f"MX_{_OTHER_CODES.get(reason, reason).upper()}"


def _refusal(count: load_pb2.RefusalCount) -> Json:
    return {
        "model_name": count.model_name,
        "source_id": count.mx_source_id,
        "side": SIDES.get(count.side, "unknown"),
        "reason": REASONS.get(count.reason, "unknown"),
        "code": _code(REASONS.get(count.reason, "")),
        "count": count.count,
        "text": count.text,
        "worker_id": count.worker_id,
        "at_ms": count.at_unix_ms,
    }


def _doubt(doubt: mx_pb2.Doubt) -> Json:
    return {
        "kind": DOUBTS.get(doubt.kind, "unknown"),
        "code": _DOUBT_CODES.get(doubt.kind, ""),
        "source_id": doubt.mx_source_id,
        "worker_id": doubt.worker_id,
        "worker_rank": doubt.worker_rank,
        "holders": list(doubt.holders),
        "chunks": doubt.chunks,
        "text": doubt.text,
        "at_ms": doubt.at_unix_ms,
    }

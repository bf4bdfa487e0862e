"""The server's state as plain data: the status page shows it, `/status` has it as JSON, scrapes count it.

Nothing in it is secret: no tokens, no store address with its password, no memory addresses of workers.
"""

from __future__ import annotations

import heapq
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any

from mxserver import __version__
from mxserver.store import Clock, Query, SourceRecord, SourceStore, StoreUnavailable
from mxserver.telemetry import (
    REASONS,
    SIDES,
    STATES,
    Events,
    FinishedLoad,
    Loads,
    Observation,
    Refusals,
    RunningLoad,
    WorkersOfModels,
)
from mxserver.web.cache_view import CacheView
from mxserver.wire.proto import load_pb2, mx_pb2, p2p_pb2, record_pb2

Json = dict[str, Any]

DEFAULT_WORKERS = 50
MOST_WORKERS = 10_000
SHOWN_LOADS = 100
SHOWN_REFUSALS = 100

# Probes, scrapes and open pages share one read of the store in this time.
LOOK_SECONDS = 1.0

_IDENTITY_FIELDS = ("revision", "dtype", "quantization")
_PARALLEL_FIELDS = ("tensor_parallel_size", "pipeline_parallel_size", "expert_parallel_size")
# The order of the list: loading workers first, then serving ones, then those that are gone.
_STATE_ORDER = {state: order for order, state in enumerate(("initializing", "ready", "stale"))}


@dataclass(frozen=True)
class _Look:
    taken_at: float
    records: list[SourceRecord] | None
    reason: str  # why there are none


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

    def as_json(self, workers_per_fleet: int = DEFAULT_WORKERS, of: Collection[str] | None = None) -> Json:
        """The whole status. Times are Unix ms, durations seconds; `fleets` is null while the store does not work.

        All fleets are counted. Workers are listed of the sources in `of`, or of all.
        """
        look = self._current_look()
        reason = self._not_ready()
        now_ms = self._clock.unix_ms()
        records = look.records or []
        running = self._loads.running()
        refusals = self._refusals.newest() if self._refusals else []
        model_of = {record.key: record.model_name for record in records}
        states = Counter(STATES[record.status] for record in records if record.status in STATES)
        return {
            "server": {
                "version": __version__,
                "now_ms": now_ms,
                "uptime_seconds": int(time.monotonic() - self._started),
                "ready": reason is None,
                "reason": reason or "",
                **self._facts,
            },
            "totals": {
                "models": len({record.model_name.lower() for record in records}),
                "workers": len(records),
                **{state: states.get(state, 0) for state in STATES.values()},
                "loads_running": len(running),
            },
            "fleets": None if look.records is None else _fleets(records, now_ms, workers_per_fleet, of),
            "refusals": [_refusal(count) for count in refusals[:SHOWN_REFUSALS]],
            "not_shared": self._refusals.not_shared() if self._refusals else [],
            "loads": [_running(load, model_of.get(load.key, "")) for load in running[:SHOWN_LOADS]],
            "finished_loads": [_finished(load, model_of.get(load.key, "")) for load in self._loads.finished()],
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
        except StoreUnavailable as error:
            return _Look(time.monotonic(), None, str(error))
        return _Look(time.monotonic(), records, "")


def _fleets(
    records: Iterable[SourceRecord], now_ms: int, workers_per_fleet: int, of: Collection[str] | None
) -> list[Json]:
    """One entry for each source id, by model name; loading workers come first."""
    by_source: dict[str, list[SourceRecord]] = defaultdict(list)
    for record in records:
        by_source[record.key.source_id].append(record)
    fleets = [
        _fleet(source, members, now_ms, workers_per_fleet if of is None or source in of else 0)
        for source, members in by_source.items()
    ]
    return sorted(fleets, key=lambda fleet: (fleet["model_name"].lower(), fleet["source_id"]))


def _fleet(source_id: str, members: list[SourceRecord], now_ms: int, workers_per_fleet: int) -> Json:
    identity = p2p_pb2.SourceIdentity.FromString(members[0].identity)
    states = Counter(STATES[member.status] for member in members if member.status in STATES)
    listed = heapq.nsmallest(
        workers_per_fleet,
        members,
        key=lambda m: (_STATE_ORDER.get(STATES.get(m.status, ""), 9), m.key.worker_rank, m.key.worker_id),
    )
    return {
        "model_name": identity.model_name,
        "source_id": source_id,
        **{name: getattr(identity, name) for name in (*_IDENTITY_FIELDS, *_PARALLEL_FIELDS)},
        "framework": p2p_pb2.BackendFramework.Name(identity.backend_framework)
        .removeprefix("BACKEND_FRAMEWORK_")
        .lower()
        if identity.backend_framework in p2p_pb2.BackendFramework.values()
        else "unknown",
        "layout": identity.extra_parameters.get("layout", ""),
        **{state: states.get(state, 0) for state in STATES.values()},
        "workers_total": len(members),
        "workers": [_worker(member, now_ms) for member in listed],
    }


def _worker(record: SourceRecord, now_ms: int) -> Json:
    worker = record_pb2.WorkerFacts.FromString(record.worker)
    return {
        "worker_id": record.key.worker_id,
        "worker_rank": record.key.worker_rank,
        "state": STATES.get(record.status, "unknown"),
        "accelerator": record.accelerator,
        "endpoint": worker.worker_grpc_endpoint,
        "source_load": record.source_load,
        "epoch": record.epoch,
        "digest_origin": mx_pb2.DigestOrigin.Name(worker.digest_origin).removeprefix("DIGEST_ORIGIN_").lower()
        if worker.digest_origin in mx_pb2.DigestOrigin.values()
        else "unknown",
        "received_from": list(worker.received_from),
        "signed_manifest": worker.signed_manifest,
        "silent_seconds": max(0.0, (now_ms - record.updated_at_ms) / 1000),
    }


def _running(load: RunningLoad, model_name: str) -> Json:
    return {
        "model_name": model_name,
        "source_id": load.key.source_id,
        "worker_id": load.key.worker_id,
        "worker_rank": load.key.worker_rank,
        "path": load.path,
        "bytes_done": load.bytes_done,
        "bytes_total": load.bytes_total,
        "bytes_per_second": load.bytes_per_second,
        "eta_seconds": load.eta_seconds,
        "from_worker_id": load.from_worker_id,
        "holders": load.holders,
        "running_seconds": load.running_seconds,
        "silent_seconds": load.silent_seconds,
    }


def _finished(load: FinishedLoad, model_name: str) -> Json:
    return {
        "model_name": load.model_name or model_name,
        "source_id": load.key.source_id,
        "worker_id": load.key.worker_id,
        "worker_rank": load.key.worker_rank,
        "at_ms": load.at_ms,
        "path": load.path,
        "bytes": load.bytes,
        "seconds": load.seconds,
        "from_worker_id": load.from_worker_id,
        "chunks_verified": load.chunks_verified,
        "fallbacks": list(load.fallbacks),
    }


def _refusal(count: load_pb2.RefusalCount) -> Json:
    return {
        "model_name": count.model_name,
        "source_id": count.mx_source_id,
        "side": SIDES.get(count.side, "unknown"),
        "reason": REASONS.get(count.reason, "unknown"),
        "count": count.count,
        "text": count.text,
        "worker_id": count.worker_id,
        "at_ms": count.at_unix_ms,
    }

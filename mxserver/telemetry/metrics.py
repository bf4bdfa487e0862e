"""The server's metrics: one table of definitions, and the objects made from it.

Names follow Prometheus' conventions (a prefix, base units, `_total` on counters). No label takes a value that a client
can choose: methods, codes, states, store operations and load paths are finite sets, everything else becomes "unknown".
What names models is in `model_metrics`, which has a page of its own.
docs/reference/metrics.md has this table; a test holds the two together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.gc_collector import GCCollector
from prometheus_client.metrics_core import Metric
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from mxserver import __version__
from mxserver.telemetry.definition import CALL_BUCKETS, LOAD_BUCKETS, Definition
from mxserver.telemetry.model_metrics import ModelMetrics
from mxserver.wire.proto import load_pb2, mx_pb2, p2p_pb2

UNKNOWN = "unknown"

DEFINITIONS: tuple[Definition, ...] = (
    Definition("mxserver_build_info", "gauge", ("version",), "1; the label has the version that runs"),
    Definition("mxserver_ready", "gauge", (), "1 while /readyz answers 200, else 0"),
    Definition("mxserver_sources", "gauge", ("state",), "workers' records by state: initializing, ready, stale"),
    Definition("mxserver_models", "gauge", (), "models that at least one ready worker serves"),
    Definition("mxserver_loads_running", "gauge", (), "loads whose progress workers report at the moment"),
    Definition("mxserver_loads_total", "counter", ("path",), "loads that workers reported as finished, by main path"),
    Definition("mxserver_load_bytes_total", "counter", ("path",), "bytes of these loads"),
    Definition("mxserver_load_duration_seconds", "histogram", ("path",), "their duration", LOAD_BUCKETS),
    Definition("mxserver_chunks_verified_total", "counter", (), "chunks whose digest was checked in these loads"),
    Definition("mxserver_load_fallbacks_total", "counter", ("path",), "paths that loads tried and left"),
    Definition("mxserver_doubts_total", "counter", ("kind",), "doubts about weights that workers told, by kind"),
    Definition(
        "mxserver_refusals_total", "counter", ("side", "reason"), "weights that workers did not offer or did not take"
    ),
    Definition(
        "mxserver_models_not_shared",
        "gauge",
        (),
        "models of which weights were refused within the last hour while no worker got any from another",
    ),
    Definition("mxserver_downloads_running", "gauge", (), "models that the server downloads at the moment"),
    Definition("mxserver_downloads_total", "counter", ("result",), "downloads that ended: done, failed"),
    Definition("mxserver_download_bytes_total", "counter", (), "bytes that downloads fetched from providers"),
    Definition("mxserver_cache_bytes", "gauge", (), "bytes of the models in the cache"),
    Definition("mxserver_cache_limit_bytes", "gauge", (), "the size that the cache may have; 0 is no limit"),
    Definition("mxserver_cache_free_bytes", "gauge", (), "bytes that are free on the cache's disk"),
    Definition("mxserver_cache_models", "gauge", (), "models (revisions) in the cache"),
    Definition(
        "mxserver_call_duration_seconds", "histogram", ("method", "code"), "gRPC calls, by outcome", CALL_BUCKETS
    ),
    Definition("mxserver_calls_in_progress", "gauge", (), "gRPC calls that are being answered"),
    Definition("mxserver_calls_waiting", "gauge", ("pool",), "gRPC calls that wait for a thread of their kind"),
    Definition(
        "mxserver_certificate_not_after_seconds", "gauge", (), "Unix time at which the server's certificate expires"
    ),
    Definition("mxserver_leases_expired_total", "counter", (), "records that became stale without a heartbeat"),
    Definition("mxserver_records_deleted_total", "counter", (), "stale records that were deleted"),
    Definition("mxserver_epochs_refused_total", "counter", (), "calls refused because a newer life had published"),
    Definition(
        "mxserver_store_operation_duration_seconds",
        "histogram",
        ("operation",),
        "operations of the store",
        CALL_BUCKETS,
    ),
    Definition("mxserver_store_errors_total", "counter", ("operation",), "operations that the store could not do"),
)

STATES: dict[p2p_pb2.SourceStatus.ValueType, str] = {
    p2p_pb2.SOURCE_STATUS_INITIALIZING: "initializing",
    p2p_pb2.SOURCE_STATUS_READY: "ready",
    p2p_pb2.SOURCE_STATUS_STALE: "stale",
}

PATHS: dict[load_pb2.LoadPath.ValueType, str] = {
    number: name.removeprefix("LOAD_PATH_").lower() for name, number in load_pb2.LoadPath.items() if number
}


DOUBTS: dict[mx_pb2.DoubtKind.ValueType, str] = {
    number: name.removeprefix("DOUBT_KIND_").lower() for name, number in mx_pb2.DoubtKind.items() if number
}


SIDES: dict[load_pb2.RefusalSide.ValueType, str] = {
    number: name.removeprefix("REFUSAL_SIDE_").lower() for name, number in load_pb2.RefusalSide.items() if number
}

REASONS: dict[load_pb2.RefusalReason.ValueType, str] = {
    number: name.removeprefix("REFUSAL_REASON_").lower() for name, number in load_pb2.RefusalReason.items() if number
}


def path_label(path: int) -> str:
    """The label of a LoadPath; "unknown" for one that this version has no name for."""
    return PATHS.get(path, UNKNOWN)  # type: ignore[call-overload,no-any-return] # an enum's number off the wire


class Metrics:
    """The metrics of one server, in a registry of its own. Thread-safe."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.models = ModelMetrics()
        ProcessCollector(registry=self.registry)
        GCCollector(registry=self.registry)
        self._of = {d.name: self._make(d) for d in DEFINITIONS if d.name not in _SCRAPED}
        self.loads = self._counter("mxserver_loads_total")
        self.load_bytes = self._counter("mxserver_load_bytes_total")
        self.load_seconds = self._histogram("mxserver_load_duration_seconds")
        self.chunks_verified = self._counter("mxserver_chunks_verified_total")
        self.load_fallbacks = self._counter("mxserver_load_fallbacks_total")
        self.doubts = self._counter("mxserver_doubts_total")
        self.refusals = self._counter("mxserver_refusals_total")
        self.downloads = self._counter("mxserver_downloads_total")
        self.download_bytes = self._counter("mxserver_download_bytes_total")
        self.call_seconds = self._histogram("mxserver_call_duration_seconds")
        self.calls_in_progress = self._gauge("mxserver_calls_in_progress")
        self.leases_expired = self._counter("mxserver_leases_expired_total")
        self.records_deleted = self._counter("mxserver_records_deleted_total")
        self.epochs_refused = self._counter("mxserver_epochs_refused_total")
        self.store_seconds = self._histogram("mxserver_store_operation_duration_seconds")
        self.store_errors = self._counter("mxserver_store_errors_total")
        self._gauge("mxserver_build_info").labels(__version__).set(1)
        for kind in (*DOUBTS.values(), UNKNOWN):
            self.doubts.labels(kind)
        for side in SIDES.values():
            for reason in (*REASONS.values(), UNKNOWN):
                self.refusals.labels(side, reason)
        for result in ("done", "failed"):
            self.downloads.labels(result)
        for path in (*PATHS.values(), UNKNOWN):  # rate() needs a series to exist before its first event
            self.loads.labels(path)
            self.load_bytes.labels(path)
            self.load_fallbacks.labels(path)

    def scrape_from(
        self, look: Callable[[], Observation], look_at_server: Callable[[], ServerObservation] | None = None
    ) -> None:
        """Both are called at every scrape for values that are looked up, not counted. Call this once."""
        self.registry.register(_Lookup(look, look_at_server))

    def _make(self, definition: Definition) -> Counter | Gauge | Histogram:
        name, kind, labels, meaning, buckets = definition
        if kind == "counter":
            return Counter(name, meaning, labels, registry=self.registry)
        if kind == "gauge":
            return Gauge(name, meaning, labels, registry=self.registry)
        return Histogram(name, meaning, labels, registry=self.registry, buckets=buckets)

    def _counter(self, name: str) -> Counter:
        metric = self._of[name]
        assert isinstance(metric, Counter)  # noqa: S101 - the table above says so
        return metric

    def _gauge(self, name: str) -> Gauge:
        metric = self._of[name]
        assert isinstance(metric, Gauge)  # noqa: S101
        return metric

    def _histogram(self, name: str) -> Histogram:
        metric = self._of[name]
        assert isinstance(metric, Histogram)  # noqa: S101
        return metric


class CacheObservation(NamedTuple):
    """What a scrape looks up of the model cache."""

    downloads_running: int
    used_bytes: int
    limit_bytes: int
    free_bytes: int
    models: int


class Observation(NamedTuple):
    """What a scrape looks up. `sources` is None while the store does not work: outdated values would mislead."""

    ready: bool
    sources: Mapping[str, int] | None
    models: int | None
    loads_running: int
    cache: CacheObservation | None = None  # None while the cache has not been used
    models_not_shared: int = 0


class ServerObservation(NamedTuple):
    """What a scrape looks up of the server itself."""

    calls_waiting: Mapping[str, int]  # by pool
    certificate_not_after: float | None  # Unix seconds; None without a certificate


_CACHE = (
    "mxserver_downloads_running",
    "mxserver_cache_bytes",
    "mxserver_cache_limit_bytes",
    "mxserver_cache_free_bytes",
    "mxserver_cache_models",
)
_SCRAPED = (
    *("mxserver_ready", "mxserver_sources", "mxserver_models", "mxserver_loads_running"),
    "mxserver_models_not_shared",
    *("mxserver_calls_waiting", "mxserver_certificate_not_after_seconds", *_CACHE),
)


class _Lookup(Collector):
    def __init__(self, look: Callable[[], Observation], look_at_server: Callable[[], ServerObservation] | None) -> None:
        self._look = look
        self._look_at_server = look_at_server
        self._meaning = {d.name: d.meaning for d in DEFINITIONS}

    def collect(self) -> Iterable[Metric]:
        seen = self._look()
        yield self._value("mxserver_ready", int(seen.ready))
        yield self._value("mxserver_loads_running", seen.loads_running)
        yield self._value("mxserver_models_not_shared", seen.models_not_shared)
        for name, value in zip(_CACHE, seen.cache or (), strict=False):
            yield self._value(name, value)
        if seen.sources is not None and seen.models is not None:
            yield self._value("mxserver_models", seen.models)
            family = GaugeMetricFamily("mxserver_sources", self._meaning["mxserver_sources"], labels=["state"])
            for state in STATES.values():
                family.add_metric([state], seen.sources.get(state, 0))
            yield family

        if self._look_at_server is not None:
            server = self._look_at_server()
            family = GaugeMetricFamily(
                "mxserver_calls_waiting", self._meaning["mxserver_calls_waiting"], labels=["pool"]
            )
            for pool, waiting in server.calls_waiting.items():
                family.add_metric([pool], waiting)
            yield family
            expiry = "mxserver_certificate_not_after_seconds"
            family = GaugeMetricFamily(expiry, self._meaning[expiry])
            if server.certificate_not_after is not None:
                family.add_metric([], server.certificate_not_after)
            yield family

    def describe(self) -> Iterable[Metric]:
        """Nothing: registering must not look anything up."""
        return []

    def _value(self, name: str, value: float) -> Metric:
        return GaugeMetricFamily(name, self._meaning[name], value=value)

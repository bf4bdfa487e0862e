"""Metrics with the names of models, in a registry of their own: they are shown to those who may see names.

Workers choose these names, so that there is a bound to them: what has loaded last is kept, the rest is "other".
"""

from __future__ import annotations

import threading
from collections import Counter as Count
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from mxserver.telemetry.definition import LOAD_BUCKETS, Definition
from mxserver.telemetry.events import bounded

MOST_MODELS = 50
LONGEST_NAME = 200
OTHER = "other"

MODEL_DEFINITIONS: tuple[Definition, ...] = (
    Definition("mxserver_model_workers", "gauge", ("model", "state"), "workers' records of a model, by state"),
    Definition("mxserver_model_loads_total", "counter", ("model", "path"), "loads of a model, by main path"),
    Definition("mxserver_model_load_bytes_total", "counter", ("model", "path"), "bytes of these loads"),
    Definition("mxserver_model_load_duration_seconds", "histogram", ("model", "path"), "their duration", LOAD_BUCKETS),
)

WorkersOfModels = Mapping[str, Mapping[str, int]]
"""Model name -> state -> how many records."""


class ModelMetrics:
    """Loads by model. Thread-safe."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._lock = threading.Lock()
        self._paths: OrderedDict[str, set[str]] = OrderedDict()  # of each model, the one that loaded last at the end
        _, loads, load_bytes, seconds = MODEL_DEFINITIONS
        self._loads = Counter(loads.name, loads.meaning, loads.labels, registry=self.registry)
        self._bytes = Counter(load_bytes.name, load_bytes.meaning, load_bytes.labels, registry=self.registry)
        self._seconds = Histogram(
            seconds.name, seconds.meaning, seconds.labels, registry=self.registry, buckets=LOAD_BUCKETS
        )

    def finished(self, model_name: str, path: str, size_bytes: int, seconds: float) -> None:
        """Counts a load. With one model too many, the one that has not loaded for longest is forgotten."""
        model = bounded(model_name, LONGEST_NAME)
        with self._lock:
            self._paths.setdefault(model, set()).add(path)
            self._paths.move_to_end(model)
            self._loads.labels(model, path).inc()
            self._bytes.labels(model, path).inc(size_bytes)
            self._seconds.labels(model, path).observe(seconds)
            while len(self._paths) > MOST_MODELS:
                forgotten, paths = self._paths.popitem(last=False)
                for one in paths:
                    for metric in (self._loads, self._bytes, self._seconds):
                        metric.remove(forgotten, one)

    def scrape_from(self, look: Callable[[], WorkersOfModels | None]) -> None:
        """`look` is called at every scrape; None while the store does not work. Call this once."""
        self.registry.register(_Workers(look))


class _Workers(Collector):
    def __init__(self, look: Callable[[], WorkersOfModels | None]) -> None:
        self._look = look

    def collect(self) -> Iterable[Metric]:
        seen = self._look()
        if seen is None:
            return
        most = sorted(seen, key=lambda model: (-sum(seen[model].values()), model))
        other: Count[str] = Count()
        for model in most[MOST_MODELS:]:
            other.update(seen[model])
        shown = {bounded(model, LONGEST_NAME): seen[model] for model in most[:MOST_MODELS]}
        definition = MODEL_DEFINITIONS[0]
        family = GaugeMetricFamily(definition.name, definition.meaning, labels=definition.labels)
        for model, states in (shown | ({OTHER: other} if other else {})).items():
            for state, count in states.items():
                family.add_metric([model, state], count)
        yield family

    def describe(self) -> Iterable[Metric]:
        """Nothing: registering must not look anything up."""
        return []

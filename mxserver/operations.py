"""What operators see of the server: metrics, events, loads, traces, and the HTTP port."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import grpc

from mxserver.models import DownloadJob, OpenCache
from mxserver.readiness import Readiness
from mxserver.security import Authenticator
from mxserver.store import SourceStore, SystemClock
from mxserver.telemetry import (
    Doubts,
    Events,
    LoadHistory,
    Loads,
    Metrics,
    ObservedStore,
    ObservingInterceptor,
    Refusals,
    ServerObservation,
    call_metrics,
)
from mxserver.web import CacheView, HttpServer, StatusView, application
from mxserver.wire.credentials import ServerTls

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

_LOG = logging.getLogger(__name__)

Traces = Literal["off", "otlp"]


class Operations:
    """Made before the services, which report to it. Thread-safe.

    The server is ready between `open` and `leave`, while its readiness finds nothing.
    """

    def __init__(
        self,
        store: SourceStore,
        *,
        lease_seconds: float,
        traces: Traces = "off",
        provider: TracerProvider | None = None,
        history: LoadHistory | None = None,
    ) -> None:
        """`provider` takes the spans; it replaces what `traces` chooses. `history`, of loads, is closed with this.

        Raises:
            SettingError: traces are wanted and their packages are not installed.
        """
        clock = SystemClock()
        self.metrics = Metrics()
        self._events = Events(clock)
        self.store = ObservedStore(store, self.metrics, self._events)
        self.refusals = Refusals(self.metrics, self._events, clock)
        self._history = history or LoadHistory()
        self.loads = Loads(
            self.metrics,
            self._events,
            clock,
            forget_seconds=lease_seconds,
            refusals=self.refusals,
            history=self._history,
        )
        self.doubts = Doubts(self.metrics, self._events, clock)
        self._clock = clock
        self._provider = provider
        around, on_unknown_method = call_metrics(self.metrics, self._events)
        arounds = [around]
        if traces == "otlp" or provider is not None:
            from mxserver import tracing

            self._provider = provider or tracing.otlp_provider()
            arounds.append(tracing.call_spans(self._provider))
        self.interceptors: tuple[grpc.ServerInterceptor, ...] = (ObservingInterceptor(arounds, on_unknown_method),)
        self.readiness = Readiness(self.store)
        self._state_lock = threading.Lock()
        self._state = "starting"
        self._http: HttpServer | None = None
        self._cache_view: CacheView | None = None

    def show_cache(self, cache: OpenCache) -> None:
        """Shows this cache and its downloads. Call before `listen`."""
        self._cache_view = CacheView(cache)

    def download_ended(self, job: DownloadJob) -> None:
        """Counts a download. A model that the cache had does not count."""
        state = job.state()
        if state.began or state.error is not None:
            self.metrics.downloads.labels(state.phase).inc()
        self.metrics.download_bytes.inc(state.progress.bytes_fetched)
        if state.error is not None:
            self._events.add("download", f"{job.model.name}: {state.message}")

    def listen(
        self,
        host: str,
        port: int,
        facts: dict[str, Any],
        *,
        tls: ServerTls | None = None,
        authenticator: Authenticator | None = None,
        look_at_server: Callable[[], ServerObservation] | None = None,
        names: tuple[str, ...] = (),
    ) -> int:
        """Starts to answer HTTP (with `tls`, HTTPS), as not ready yet. Returns the port. Call once.

        With an authenticator, pages that name models and workers need a token; without one, they are shown under
        `names` and those of web.pages.is_own_name alone. Raises OSError and SettingError.
        """
        view = StatusView(
            self.store,
            self.loads,
            self._events,
            self._clock,
            not_ready=self.not_ready,
            facts=facts,
            cache=self._cache_view,
            refusals=self.refusals,
            doubts=self.doubts,
        )
        self.metrics.scrape_from(view.observation, look_at_server)
        self.metrics.models.scrape_from(view.workers_of_models)
        app = application(
            self.metrics.registry,
            view,
            self.not_ready,
            authenticator,
            names,
            model_registry=self.metrics.models.registry,
            not_alive=self.readiness.not_alive,
        )
        self._http = HttpServer(host, port, app, tls)
        self._http.start()
        return self._http.port

    def open(self) -> None:
        """The server answers calls from now on."""
        with self._state_lock:
            if self._state == "starting":
                self._state = "open"

    def leave(self) -> None:
        """The server is not ready any more, for good. Idempotent."""
        with self._state_lock:
            self._state = "draining"

    def not_ready(self) -> str | None:
        """Why the server is not ready; None when it is."""
        with self._state_lock:
            state = self._state
        if state != "open":
            return state
        return self.readiness.not_ready()

    def close(self) -> None:
        """Releases the port and sends the remaining traces. Idempotent."""
        self.leave()
        if self._http is not None:
            self._http.stop()
        self.readiness.close()
        self._history.close()
        if self._provider is not None:
            self._provider.shutdown()
            self._provider = None

"""grpc.health.v1: the true state of each service, and of the whole server under "".

The whole server and P2pService are SERVING while the server is ready (`mxserver.readiness`), ModelService while the
cache folder works. All are NOT_SERVING once the server drains.

grpcio-health-checking's own servicer is not used: it holds a lock while it sends to watchers, which the thread that
tells of ended calls needs too, so that watchers who leave stop the whole server
(tests/server/services/test_health_watches.py).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from mxserver.calls import PATIENCE_SECONDS, CallPool, Receiving, in_pool

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN

WITH_STORE = ("", "model_express.p2p.P2pService")
WITHOUT_STORE = ("model_express.health.HealthService", "model_express.api.ApiService", health.SERVICE_NAME)
WITH_CACHE = ("model_express.model.ModelService", "model_express.mx.CacheService")

MOST_WATCHERS = 64
"""Each holds a thread. More are answered UNIMPLEMENTED, which gRPC's clients take for "healthy, and not watched"."""


class StandardHealth(health_pb2_grpc.HealthServicer):  # type: ignore[misc] # grpc_health has no types
    """The health service. Watchers wait in threads of their own and are never sent to under a lock. Thread-safe."""

    def __init__(self) -> None:
        super().__init__()
        self._changed = threading.Condition()
        self._states: dict[str, Any] = dict.fromkeys((*WITH_STORE, *WITHOUT_STORE, *WITH_CACHE), _SERVING)
        self._watchers = 0
        self._drains = False
        self._store_works = True
        self._cache_works = True
        # Twice as many threads: a watcher too many is told so, and does not wait for another one to leave.
        self.Watch = in_pool(self._watch, CallPool(2 * MOST_WATCHERS, "health-watch", Receiving(1, PATIENCE_SECONDS)))

    def show_store(self, *, works: bool) -> bool:
        """Sets the state of the services that need the store. Returns whether it changed.

        Called by one thread. The state is not changed any more once the server drains.
        """
        if works is self._store_works:
            return False
        self._store_works = works
        self._set(WITH_STORE, works)
        return True

    def show_cache(self, works: bool) -> None:
        """Sets the state of the services that need the model cache. Called by one thread."""
        if works is not self._cache_works:
            self._cache_works = works
            self._set(WITH_CACHE, works)

    def drain(self) -> None:
        """Sets all services to NOT_SERVING for good, tells watchers, and ends their calls. Idempotent."""
        with self._changed:
            self._states = dict.fromkeys(self._states, _NOT_SERVING)
            self._drains = True
            self._changed.notify_all()

    def Check(  # noqa: N802
        self, request: health_pb2.HealthCheckRequest, context: grpc.ServicerContext
    ) -> health_pb2.HealthCheckResponse:
        """NOT_FOUND for services that this server has not."""
        with self._changed:
            state = self._states.get(request.service)
        if state is None:
            context.abort(grpc.StatusCode.NOT_FOUND, f"this server has no service {request.service[:100]!r}")
        return health_pb2.HealthCheckResponse(status=state)

    def _watch(
        self, request: health_pb2.HealthCheckRequest, context: grpc.ServicerContext
    ) -> Iterator[health_pb2.HealthCheckResponse]:
        """The state now, and at each change. Ends when the caller leaves, or the server drains."""
        with self._changed:
            is_one_too_many = self._watchers >= MOST_WATCHERS
            self._watchers += not is_one_too_many
        if is_one_too_many:
            context.abort(grpc.StatusCode.UNIMPLEMENTED, f"{MOST_WATCHERS} callers watch already; use Check")
        try:
            if not context.add_callback(self._wake):
                return
            told = None
            while True:
                with self._changed:  # asked under it whether the caller is there: `_wake` comes after that, if at all
                    if not context.is_active():
                        return
                    state, drains = self._states.get(request.service, _UNKNOWN), self._drains
                    if state == told and not drains:
                        self._changed.wait()
                        continue
                if state != told:
                    yield health_pb2.HealthCheckResponse(status=state)
                    told = state
                if drains:
                    return
        finally:
            with self._changed:
                self._watchers -= 1

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _set(self, services: tuple[str, ...], works: bool) -> None:
        with self._changed:
            if not self._drains:
                self._states |= dict.fromkeys(services, _SERVING if works else _NOT_SERVING)
                self._changed.notify_all()

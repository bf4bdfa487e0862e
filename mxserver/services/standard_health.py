"""grpc.health.v1: the true state of each service, and of the whole server under "".

The whole server and P2pService are SERVING while the store works, ModelService while the cache folder works. All are
NOT_SERVING once the server drains.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import grpc
from grpc_health.v1 import health, health_pb2

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING

WITH_STORE = ("", "model_express.p2p.P2pService")
WITHOUT_STORE = ("model_express.health.HealthService", "model_express.api.ApiService", health.SERVICE_NAME)
WITH_CACHE = ("model_express.model.ModelService", "model_express.mx.CacheService")

Send = Callable[[health_pb2.HealthCheckResponse | None], None]


class StandardHealth(health.HealthServicer):  # type: ignore[misc] # grpc_health has no types
    """The health service. It can end its watchers, so that they do not delay a drain."""

    def __init__(self) -> None:
        super().__init__()
        self._watchers: set[Send] = set()
        self._watchers_lock = threading.Lock()
        for service in (*WITH_STORE, *WITHOUT_STORE, *WITH_CACHE):
            self.set(service, _SERVING)
        self._store_works = True
        self._cache_works = True

    def show_store(self, *, works: bool) -> bool:
        """Sets the state of the services that need the store. Returns whether it changed.

        Called by one thread. The state is not changed any more once the server drains.
        """
        if works is self._store_works:  # watchers get changes only
            return False
        self._store_works = works
        for service in WITH_STORE:
            self.set(service, _SERVING if works else _NOT_SERVING)
        return True

    def show_cache(self, works: bool) -> None:
        """Sets the state of the services that need the model cache. Called by one thread."""
        if works is not self._cache_works:
            self._cache_works = works
            for service in WITH_CACHE:
                self.set(service, _SERVING if works else _NOT_SERVING)

    def drain(self) -> None:
        """Sets all services to NOT_SERVING for good, tells watchers, and ends their calls."""
        self.enter_graceful_shutdown()
        with self._watchers_lock:
            watchers = list(self._watchers)
        for send in watchers:
            send(None)

    def Watch(  # noqa: N802
        self, request: health_pb2.HealthCheckRequest, context: grpc.ServicerContext, send: Send | None = None
    ) -> Iterator[health_pb2.HealthCheckResponse] | None:
        """`send` is what grpcio passes to methods that answer without holding a thread."""
        if send is not None:
            with self._watchers_lock:
                self._watchers.add(send)
            if not context.add_callback(lambda: self._forget(send)):
                self._forget(send)
        responses: Iterator[health_pb2.HealthCheckResponse] | None = super().Watch(request, context, send)
        return responses

    def _forget(self, send: Send) -> None:
        with self._watchers_lock:
            self._watchers.discard(send)

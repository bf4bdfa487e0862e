"""HealthService and ApiService of the existing protocol."""

from __future__ import annotations

import time
from collections.abc import Callable

import grpc

import mxserver
from mxserver.wire.proto import api_pb2, api_pb2_grpc, health_pb2, health_pb2_grpc


class HealthService(health_pb2_grpc.HealthServiceServicer):
    """Version, uptime, and "ok" while the store works; otherwise its reason."""

    def __init__(self, store_problem: Callable[[], str | None]) -> None:
        self._store_problem = store_problem
        self._started_at = time.monotonic()

    def GetHealth(  # noqa: N802
        self, request: health_pb2.HealthRequest, context: grpc.ServicerContext
    ) -> health_pb2.HealthResponse:
        return health_pb2.HealthResponse(
            version=mxserver.__version__,
            status=self._store_problem() or "ok",
            uptime=int(time.monotonic() - self._started_at),
            now_unix_ms=time.time_ns() // 1_000_000,
        )


class ApiService(api_pb2_grpc.ApiServiceServicer):
    """`ping`: existing clients check with it whether a server answers."""

    def SendRequest(  # noqa: N802
        self, request: api_pb2.ApiRequest, context: grpc.ServicerContext
    ) -> api_pb2.ApiResponse:
        if request.action == "ping":
            return api_pb2.ApiResponse(success=True, data=b'{"message":"pong"}')
        return api_pb2.ApiResponse(success=False, error=f"unknown action {request.action!r}; the only one is 'ping'")

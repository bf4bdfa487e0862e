"""What readiness calls: a heartbeat's way through gRPC, its threads and the records, without changing any."""

from __future__ import annotations

import contextlib
from typing import Any

import grpc

from mxserver.store import SourceStore, StoreUnavailable

SERVICE = "model_express.mx.Probe"


class ProbeService:
    """Thread-safe. `add_to` a server."""

    def __init__(self, store: SourceStore) -> None:
        self._store = store

    def add_to(self, server: grpc.Server) -> None:
        handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            "Heartbeat": grpc.unary_unary_rpc_method_handler(self._heartbeat),
            "Call": grpc.unary_unary_rpc_method_handler(lambda request, _: b""),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))

    def _heartbeat(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        """In the threads of heartbeats; waits for the lock of the records, as they do."""
        with contextlib.suppress(StoreUnavailable):  # the store is looked at by itself
            self._store.get("probe", "probe")
        return b""

"""WatchService: workers that wait, or receive, hear what changes for their weights and rank."""

from __future__ import annotations

from typing import Any

import grpc

from mxserver.calls import PushedStream, Statuses, refuse, refusing, without_thread
from mxserver.limits import DEFAULT, ServerLimits
from mxserver.security import current_owner
from mxserver.waiting import TooManyWatches, Watches
from mxserver.wire.proto import watch_pb2

__all__ = ["WatchService"]

SERVICE = "model_express.mx.WatchService"
_STATUSES: Statuses = {TooManyWatches: grpc.StatusCode.RESOURCE_EXHAUSTED}
_MOST_LEVELS = 16


class WatchService:
    """Thread-safe. `add_to` a server. A stream costs no thread while nothing changes."""

    def __init__(self, watches: Watches, limits: ServerLimits = DEFAULT) -> None:
        self._watches, self._limits = watches, limits

    def add_to(self, server: grpc.Server) -> None:
        handler = grpc.unary_stream_rpc_method_handler(
            self._begin, watch_pb2.WatchSourcesRequest.FromString, watch_pb2.SourcesNow.SerializeToString
        )
        handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {"WatchSources": handler}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))

    @without_thread
    def _begin(self, request: watch_pb2.WatchSourcesRequest, context: grpc.ServicerContext, send: Any) -> None:
        if not request.mx_source_id or not request.worker_id:
            refuse(context, grpc.StatusCode.INVALID_ARGUMENT, "mx_source_id or worker_id is missing")
        if request.ByteSize() > self._limits.topology_bytes or len(request.levels) > _MOST_LEVELS:
            reason = self._limits.refusal("topology_bytes", f"this request has {request.ByteSize()} bytes")
            refuse(context, grpc.StatusCode.INVALID_ARGUMENT, reason)
        owner = current_owner()
        host = context.peer().rpartition(":")[0]
        client = f"caller {owner} at host {host}" if owner else f"host {host}"
        with refusing("WatchSources", context, _STATUSES):
            self._watches.begin(request, client, lambda ended: PushedStream(context, ended))

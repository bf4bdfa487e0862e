"""P2pService: workers publish, list and fetch records.

Existing clients expect status OK with `success`, `found` or an empty list for invalid requests, so these get answers,
not errors. Errors are: a store that does not work (UNAVAILABLE, never an empty list), and an epoch of an earlier life
(FAILED_PRECONDITION with the code in the trailing metadata). Only our own clients send epochs.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from mxserver.calls import AnswersUnderWay, length_delimited, refuse, refuses
from mxserver.limits import DEFAULT, ServerLimits
from mxserver.security import current_owner
from mxserver.services.publish_request import PublishRequest
from mxserver.store import (
    Leases,
    NotOwner,
    Publication,
    Query,
    RecordKey,
    SourceStore,
    StoreFull,
    StoreUnavailable,
    UnknownRecord,
    require_epoch,
    require_owner,
)
from mxserver.telemetry import Loads
from mxserver.waiting import nearest, reference
from mxserver.wire import StaleEpoch
from mxserver.wire.calls import source_id
from mxserver.wire.proto import p2p_pb2, record_pb2

_LOG = logging.getLogger(__name__)

_UNKNOWN = p2p_pb2.SOURCE_STATUS_UNKNOWN
_CHOSEN_FROM = 256  # the newest ones, when the nearest are asked for
_STATUSES = (p2p_pb2.SOURCE_STATUS_INITIALIZING, p2p_pb2.SOURCE_STATUS_READY, p2p_pb2.SOURCE_STATUS_STALE)


_refuses = refuses(
    {
        StoreUnavailable: grpc.StatusCode.UNAVAILABLE,
        StaleEpoch: grpc.StatusCode.FAILED_PRECONDITION,
        NotOwner: grpc.StatusCode.PERMISSION_DENIED,
        StoreFull: grpc.StatusCode.RESOURCE_EXHAUSTED,
    }
)


SERVICE = "model_express.p2p.P2pService"


class P2pService:
    """Thread-safe, as far as the store is. `add_to` a server.

    What it only passes on, such as tensors, is not parsed: see record.proto.
    """

    def __init__(
        self,
        store: SourceStore,
        leases: Leases,
        loads: Loads,
        limits: ServerLimits = DEFAULT,
        answers: AnswersUnderWay | None = None,
        changed: Callable[[RecordKey, p2p_pb2.SourceStatus.ValueType | None], None] = lambda key, status: None,
    ) -> None:
        """`changed` hears of each publish (without a status) and of each update."""
        self._changed = changed
        self._limits = limits
        self._answers = answers or AnswersUnderWay(limits)
        self._store = store
        self._loads = loads
        self._lease_ms = round(leases.heartbeat_seconds * 1000)

    def add_to(self, server: grpc.Server) -> None:
        methods: dict[str, tuple[Any, Any, Any]] = {
            "PublishMetadata": (self.PublishMetadata, PublishRequest.parse, p2p_pb2.PublishMetadataResponse),
            "ListSources": (self.ListSources, p2p_pb2.ListSourcesRequest.FromString, p2p_pb2.ListSourcesResponse),
            "UpdateStatus": (self.UpdateStatus, p2p_pb2.UpdateStatusRequest.FromString, p2p_pb2.UpdateStatusResponse),
        }
        handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            name: grpc.unary_unary_rpc_method_handler(method, parse, answered.SerializeToString)
            for name, (method, parse, answered) in methods.items()
        }
        handlers["GetMetadata"] = grpc.unary_unary_rpc_method_handler(
            self.GetMetadata, p2p_pb2.GetMetadataRequest.FromString
        )
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))

    @_refuses
    def PublishMetadata(  # noqa: N802
        self, published: PublishRequest, context: grpc.ServicerContext
    ) -> p2p_pb2.PublishMetadataResponse:
        request = published.facts
        if missing := _missing_to_publish(request):
            return p2p_pb2.PublishMetadataResponse(success=False, message=f"{missing} is missing")
        if too_long := _too_long_to_publish(request, self._limits):
            return p2p_pb2.PublishMetadataResponse(success=False, message=too_long)
        record = self._store.publish(_publication(request, published.worker))
        self._changed(record.key, None)
        self._loads.published(record.key, request)
        pod = (request.pod_namespace, request.pod_name) if request.pod_name else ()
        _LOG.info(
            "published source=%s worker=%s rank=%d status=%s epoch=%d model=%r" + (" pod=%s/%s" if pod else ""),
            *record.key,
            _name(record.status),
            record.epoch,
            record.model_name,
            *pod,
        )
        return p2p_pb2.PublishMetadataResponse(
            success=True,
            message="published",
            mx_source_id=record.key.source_id,
            worker_id=record.key.worker_id,
            epoch=record.epoch,
            lease_ms=self._lease_ms,
        )

    @_refuses
    def ListSources(  # noqa: N802
        self, request: p2p_pb2.ListSourcesRequest, context: grpc.ServicerContext
    ) -> p2p_pb2.ListSourcesResponse:
        if request.min_training_step > 0:
            # An empty list would say that nobody has reached it.
            refuse(context, grpc.StatusCode.UNIMPLEMENTED, "min_training_step: records have no training step here")
        query = _query(request, self._limits.listing_rows)
        if request.near_worker_id and query.limit is not None:
            found = self._store.find(replace(query, limit=max(query.limit, _CHOSEN_FROM)))
            records = nearest(found, request.near_worker_id, request.near_topology, request.near_levels, query.limit)
        else:
            records = self._store.find(query)
        return p2p_pb2.ListSourcesResponse(instances=self._within_limit(map(reference, records)))

    def _within_limit(self, references: Iterable[p2p_pb2.SourceInstanceRef]) -> Iterator[p2p_pb2.SourceInstanceRef]:
        """The newest ones, as many as one answer may have. Filters find the rest, which nobody can page to."""
        left = self._limits.listing_bytes
        for each in references:
            left -= each.ByteSize() + 8
            if left < 0:
                _LOG.warning("%s", self._limits.refusal("listing_bytes", "an answer of ListSources was cut"))
                return
            yield each

    @_refuses
    def GetMetadata(self, request: p2p_pb2.GetMetadataRequest, context: grpc.ServicerContext) -> bytes:  # noqa: N802
        """A serialised RecordResponse: it may have a hundred MiB, and would be copied once more as a message."""
        record = self._store.get(request.mx_source_id, request.worker_id)
        if record is not None:
            self._answers.reserve(context, record.payload_bytes)  # before it is read
        worker = None
        while record is not None and (worker := self._store.whole_worker(record)) is None:
            record = self._store.get(request.mx_source_id, request.worker_id)  # it changed meanwhile
        if record is None or worker is None:
            missing = record_pb2.RecordResponse(mx_source_id=request.mx_source_id, worker_id=request.worker_id)
            return missing.SerializeToString()
        answer = record_pb2.RecordResponse(
            found=True,
            mx_source_id=record.key.source_id,
            worker_id=record.key.worker_id,
            identity=record.identity,
            epoch=record.epoch,
            owner=record.owner,
        )
        # Two messages one after the other are one with the fields of both.
        now = record_pb2.WorkerFacts(status=record.status, updated_at=record.updated_at_ms).SerializeToString()
        head = length_delimited(record_pb2.RecordResponse.WORKER_FIELD_NUMBER, len(worker) + len(now))
        return b"".join((answer.SerializeToString(), head, worker, now))

    @_refuses
    def UpdateStatus(  # noqa: N802
        self, request: p2p_pb2.UpdateStatusRequest, context: grpc.ServicerContext
    ) -> p2p_pb2.UpdateStatusResponse:
        if request.status == _UNKNOWN and request.HasField("load_progress"):
            return self._take_progress(request)
        if request.status not in _STATUSES:
            return p2p_pb2.UpdateStatusResponse(
                success=False, message=f"status {request.status} must be INITIALIZING (1), READY (2) or STALE (3)"
            )
        key = RecordKey(request.mx_source_id, request.worker_id, request.worker_rank)
        load = request.source_load if request.HasField("source_load") and math.isfinite(request.source_load) else None
        leaves = request.status == p2p_pb2.SOURCE_STATUS_STALE and not self._has_left(key)
        try:
            self._store.update_status(key, request.status, epoch=request.epoch, source_load=load, owner=current_owner())
        except UnknownRecord as error:
            return p2p_pb2.UpdateStatusResponse(success=False, message=str(error))
        self._changed(key, request.status)
        record = (
            self._store.get(key.source_id, key.worker_id)
            if request.HasField("load_report") or request.refusals
            else None
        )
        if record is None:
            self._loads.updated(key, request)
        else:
            worker = record_pb2.WorkerFacts.FromString(record.worker)
            self._loads.updated(key, request, record.model_name, worker)
        if leaves:
            _LOG.info("left source=%s worker=%s rank=%d", *key)
        else:
            _LOG.debug("updated source=%s worker=%s rank=%d status=%s", *key, _name(request.status))
        return p2p_pb2.UpdateStatusResponse(success=True, message="updated")

    def _take_progress(self, request: p2p_pb2.UpdateStatusRequest) -> p2p_pb2.UpdateStatusResponse:
        """Takes progress, which changes no record. Late progress, of a load that has ended, is ignored."""
        key = RecordKey(request.mx_source_id, request.worker_id, request.worker_rank)
        record = self._store.get(key.source_id, key.worker_id)
        if record is None or record.key != key or record.status != p2p_pb2.SOURCE_STATUS_INITIALIZING:
            return p2p_pb2.UpdateStatusResponse(success=False, message="no such worker is loading")
        require_owner(record, current_owner())
        require_epoch(record, request.epoch)
        again_seconds = self._loads.told(key, request.load_progress)
        return p2p_pb2.UpdateStatusResponse(success=True, message="noted", next_progress_ms=round(again_seconds * 1000))

    def _has_left(self, key: RecordKey) -> bool:
        """Whether the worker said goodbye already. If it was killed meanwhile, its departure process says it again."""
        record = self._store.get(key.source_id, key.worker_id)
        return record is not None and record.key == key and record.status == p2p_pb2.SOURCE_STATUS_STALE


def update_waits(store: SourceStore, serialized: bytes) -> bool:
    """Whether the update of a status, as a request's bytes, will wait for a disk."""
    try:
        request = p2p_pb2.UpdateStatusRequest.FromString(serialized)
        return store.waits_for_disk(
            RecordKey(request.mx_source_id, request.worker_id, request.worker_rank), request.status
        )
    except (DecodeError, StoreUnavailable):
        return False  # refused where it is


def _name(status: p2p_pb2.SourceStatus.ValueType) -> str:
    return p2p_pb2.SourceStatus.Name(status).removeprefix("SOURCE_STATUS_")


def _missing_to_publish(request: record_pb2.PublishRequest) -> str | None:
    if not request.HasField("identity"):
        return "identity"
    if not request.identity.model_name:
        return "identity.model_name"
    if not request.worker_id:
        return "worker_id"
    if not request.HasField("worker"):
        return "worker"
    return None


def _too_long_to_publish(request: record_pb2.PublishRequest, limits: ServerLimits) -> str | None:
    """What of the request is over its limit. All of it is kept in memory, and the names are in every listing."""
    topology = request.worker.topology
    sizes = (
        ("identity.model_name", len(request.identity.model_name.encode()), "model_name_bytes"),
        ("worker_id", len(request.worker_id.encode()), "worker_id_bytes"),
        ("identity", request.identity.ByteSize(), "identity_bytes"),
        ("worker.accelerator", len(request.worker.accelerator.encode()), "worker_id_bytes"),
        ("worker.pod_name", len(request.worker.pod_name.encode()), "worker_id_bytes"),
        ("worker.node_name", len(request.worker.node_name.encode()), "worker_id_bytes"),
        ("worker.replica", len(request.worker.replica.encode()), "worker_id_bytes"),
        ("worker.worker_grpc_endpoint", len(request.worker.worker_grpc_endpoint.encode()), "worker_id_bytes"),
        ("worker.topology", sum(len(k.encode()) + len(v.encode()) for k, v in topology.items()), "topology_bytes"),
    )
    over = next(((name, size, limit) for name, size, limit in sizes if size > getattr(limits, limit)), None)
    return limits.refusal(over[2], f"{over[0]} has {over[1]} bytes") if over else None


def _publication(request: record_pb2.PublishRequest, metadata: bytes) -> Publication:
    worker = request.worker
    status = worker.status if worker.status in _STATUSES else _UNKNOWN
    return Publication(
        key=RecordKey(source_id(request.identity), request.worker_id, worker.worker_rank),
        identity=request.identity.SerializeToString(),
        worker=metadata,
        model_name=request.identity.model_name,
        accelerator=worker.accelerator,
        topology=dict(worker.topology),
        endpoint=worker.worker_grpc_endpoint,
        status=status,
        epoch=request.epoch,
        owner=current_owner(),
    )


def _query(request: p2p_pb2.ListSourcesRequest, most: int) -> Query:
    """The filters that are set. An empty value, a status that is none, or a limit of 0 means no filter."""
    return Query(
        source_id=source_id(request.identity) if request.identity.model_name else None,
        model_name=request.model_name_filter or None,
        status=request.status_filter if request.status_filter in _STATUSES else None,
        worker_rank=request.worker_rank_filter if request.HasField("worker_rank_filter") else None,
        min_updated_at_ms=request.min_updated_at if request.HasField("min_updated_at") else None,
        limit=min(request.limit or most, most),
    )

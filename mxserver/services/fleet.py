"""FleetService: the storage reader election, and doubts about weights that workers tell.

Of workers that start together without a source, one reads storage (mxserver/waiting).
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import grpc

from mxserver.calls import refuse, refuses
from mxserver.security import current_owner
from mxserver.store import Clock, NotOwner, Query, SourceStore, StoreUnavailable, SystemClock, require_owner
from mxserver.telemetry import Doubts, Refusals
from mxserver.waiting import ElectionKey, StorageElections
from mxserver.wire.proto import mx_pb2, mx_pb2_grpc, p2p_pb2

__all__ = ["FleetService"]

_LOG = logging.getLogger(__name__)

_LONGEST_DOMAIN = 256


_refuses = refuses({StoreUnavailable: grpc.StatusCode.UNAVAILABLE, NotOwner: grpc.StatusCode.PERMISSION_DENIED})


class FleetService(mx_pb2_grpc.FleetServiceServicer):
    """Thread-safe, as far as the store is. `changed` hears of which weights and rank something is new."""

    def __init__(
        self,
        store: SourceStore,
        elections: StorageElections,
        doubts: Doubts,
        refusals: Refusals,
        clock: Clock | None = None,
        changed: Callable[[str, int], None] = lambda source_id, rank: None,
    ) -> None:
        self._store = store
        self._doubts = doubts
        self._refusals = refusals
        self._elections = elections
        self._changed = changed
        self._started_ms = (clock or SystemClock()).unix_ms()

    @_refuses
    def TakeStorageTurn(  # noqa: N802 - the protocol's name, as below
        self, request: mx_pb2.TakeStorageTurnRequest, context: grpc.ServicerContext
    ) -> mx_pb2.TakeStorageTurnResponse:
        key = _key(request, context)
        self._require_own(request)
        answer = self._elections.take(
            key, request.worker_id, request.epoch, lambda: self._others_were_starting(key, request.worker_id)
        )
        if answer.turn == mx_pb2.STORAGE_TURN_YOURS and not request.epoch:
            self._changed(key.source_id, key.worker_rank)
        return answer

    @_refuses
    def EndStorageTurn(  # noqa: N802
        self, request: mx_pb2.EndStorageTurnRequest, context: grpc.ServicerContext
    ) -> mx_pb2.EndStorageTurnResponse:
        key = _key(request, context)
        self._require_own(request)
        if self._elections.end(key, request.worker_id, request.epoch, shared=request.shared):
            self._changed(key.source_id, key.worker_rank)
        return mx_pb2.EndStorageTurnResponse()

    @_refuses
    def TellDoubt(  # noqa: N802
        self, request: mx_pb2.TellDoubtRequest, context: grpc.ServicerContext
    ) -> mx_pb2.TellDoubtResponse:
        doubt = request.doubt
        record = self._store.get(doubt.mx_source_id, doubt.worker_id)
        if record is not None:
            require_owner(record, current_owner())
        self._doubts.told(doubt)
        self._changed(doubt.mx_source_id, doubt.worker_rank)
        return mx_pb2.TellDoubtResponse()

    def ListDoubts(  # noqa: N802
        self, request: mx_pb2.ListDoubtsRequest, context: grpc.ServicerContext
    ) -> mx_pb2.ListDoubtsResponse:
        source_id = request.mx_source_id
        return mx_pb2.ListDoubtsResponse(
            doubts=self._doubts.newest(source_id), refusals=self._refusals.newest(source_id)
        )

    def _require_own(self, request: mx_pb2.TakeStorageTurnRequest | mx_pb2.EndStorageTurnRequest) -> None:
        """Raises NotOwner where the worker's record is another caller's: nobody reads, or stops to read, for others."""
        owner = current_owner()
        record = self._store.get(request.mx_source_id, request.worker_id) if owner else None
        if record is not None:
            require_owner(record, owner)

    def _others_were_starting(self, key: ElectionKey, worker_id: str) -> bool:
        """Whether a record from before this server's start shows that another worker may be reading."""
        query = Query(source_id=key.source_id, worker_rank=key.worker_rank, status=p2p_pb2.SOURCE_STATUS_INITIALIZING)
        try:
            records = self._store.find(query)
        except StoreUnavailable as error:
            _LOG.warning("whether others are starting is not known reason=%s", error)
            return False
        return any(r.key.worker_id != worker_id and r.updated_at_ms <= self._started_ms for r in records)


def _key(
    request: mx_pb2.TakeStorageTurnRequest | mx_pb2.EndStorageTurnRequest, context: grpc.ServicerContext
) -> ElectionKey:
    if not request.mx_source_id or not request.worker_id:
        refuse(context, grpc.StatusCode.INVALID_ARGUMENT, "mx_source_id or worker_id is missing")
    if len(request.domain) > _LONGEST_DOMAIN:
        reason = f"domain has {len(request.domain)} characters, at most {_LONGEST_DOMAIN} are taken"
        refuse(context, grpc.StatusCode.INVALID_ARGUMENT, reason)
    return ElectionKey(request.mx_source_id, request.worker_rank, request.domain)

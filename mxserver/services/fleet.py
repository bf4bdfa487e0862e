"""FleetService: the storage reader election, and doubts about weights that workers tell.

Of workers that start together without a source, one reads storage.

Elections are leases in this process' memory, so a restart of the server forgets them. For the length of one lease
after a restart, the server elects a reader only where no worker was starting before; a living reader extends its lease.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import grpc

from mxserver.calls import refuse, refuses
from mxserver.security import current_owner
from mxserver.store import Clock, NotOwner, Query, SourceStore, StoreUnavailable, SystemClock, require_owner
from mxserver.telemetry import Doubts, Refusals
from mxserver.wire.proto import mx_pb2, mx_pb2_grpc, p2p_pb2

__all__ = ["ElectionKey", "FleetService", "StorageElections"]

_LOG = logging.getLogger(__name__)

LEASE_SECONDS = 6.0
EVERYBODY_SECONDS = 60.0
_LONGEST_DOMAIN = 256
_SHORTEST_RETRY_SECONDS = 0.25
_RETRY_SECONDS_A_WAITER = 0.005  # 200 questions a second in all, however many wait
_LONGEST_RETRY_SECONDS = 5.0


class ElectionKey(NamedTuple):
    """The workers that one reader serves: all with these weights and this rank, where they may share them."""

    source_id: str
    worker_rank: int
    domain: str = ""


@dataclass
class _Reader:
    worker_id: str
    epoch: int
    until: float  # monotonic seconds


class StorageElections:
    """Which worker reads storage for which others. Thread-safe."""

    def __init__(self, clock: Clock | None = None) -> None:
        self._clock = clock or SystemClock()
        self._lock = threading.Lock()
        self._started = self._clock.monotonic_seconds()
        self._epoch = self._clock.unix_ms()
        self._readers: dict[ElectionKey, _Reader] = {}
        self._everybody: dict[ElectionKey, float] = {}
        self._waiting: dict[ElectionKey, dict[str, float]] = {}

    def take(
        self, key: ElectionKey, worker_id: str, epoch: int, others_were_starting: Callable[[], bool]
    ) -> mx_pb2.TakeStorageTurnResponse:
        """Elects this worker, extends its lease (if it passes the lease's epoch), or tells it to wait."""
        with self._lock:
            now = self._clock.monotonic_seconds()
            self._forget(now)
            if self._everybody.get(key, now) > now:
                return mx_pb2.TakeStorageTurnResponse(turn=mx_pb2.STORAGE_TURN_EVERYBODY)
            reader = self._readers.get(key)
            if reader is not None and (reader.worker_id != worker_id or epoch not in (0, reader.epoch)):
                return self._wait(key, worker_id, reader.worker_id, now)
            settling = now < self._started + LEASE_SECONDS
            if reader is None and not epoch and settling and others_were_starting():
                return self._wait(key, worker_id, "", now)
            if reader is None:
                self._epoch += 1
                reader = self._readers[key] = _Reader(worker_id, max(epoch, self._epoch), now)
                _LOG.info(
                    "storage reader elected source=%s rank=%d domain=%r worker=%s epoch=%d",
                    *key,
                    worker_id,
                    reader.epoch,
                )
            reader.until = now + LEASE_SECONDS
            self._waiting.get(key, {}).pop(worker_id, None)
            return mx_pb2.TakeStorageTurnResponse(
                turn=mx_pb2.STORAGE_TURN_YOURS,
                epoch=reader.epoch,
                lease_ms=round(LEASE_SECONDS * 1000),
                reader_worker_id=worker_id,
            )

    def end(self, key: ElectionKey, worker_id: str, epoch: int, *, shared: bool) -> bool:
        """Ends a reader's lease. Returns False if the worker no longer holds it."""
        with self._lock:
            reader = self._readers.get(key)
            if reader is None or (reader.worker_id, reader.epoch) != (worker_id, epoch):
                return False
            del self._readers[key]
            if not shared:
                self._everybody[key] = self._clock.monotonic_seconds() + EVERYBODY_SECONDS
        _LOG.info("storage reader done source=%s rank=%d domain=%r worker=%s shared=%s", *key, worker_id, shared)
        return True

    def _wait(self, key: ElectionKey, worker_id: str, reader: str, now: float) -> mx_pb2.TakeStorageTurnResponse:
        waiting = self._waiting.setdefault(key, {})
        waiting[worker_id] = now + 2 * _LONGEST_RETRY_SECONDS
        retry = min(_LONGEST_RETRY_SECONDS, max(_SHORTEST_RETRY_SECONDS, len(waiting) * _RETRY_SECONDS_A_WAITER))
        return mx_pb2.TakeStorageTurnResponse(
            turn=mx_pb2.STORAGE_TURN_WAIT, retry_ms=round(retry * 1000), reader_worker_id=reader
        )

    def _forget(self, now: float) -> None:
        for key in [key for key, reader in self._readers.items() if reader.until < now]:
            _LOG.warning(
                "storage reader lost source=%s rank=%d domain=%r worker=%s", *key, self._readers.pop(key).worker_id
            )
        for key in [key for key, until in self._everybody.items() if until < now]:
            del self._everybody[key]
        for key, waiting in list(self._waiting.items()):
            for worker_id in [worker_id for worker_id, until in waiting.items() if until < now]:
                del waiting[worker_id]
            if not waiting:
                del self._waiting[key]


_refuses = refuses({StoreUnavailable: grpc.StatusCode.UNAVAILABLE, NotOwner: grpc.StatusCode.PERMISSION_DENIED})


class FleetService(mx_pb2_grpc.FleetServiceServicer):
    """Thread-safe, as far as the store is."""

    def __init__(self, store: SourceStore, doubts: Doubts, refusals: Refusals, clock: Clock | None = None) -> None:
        self._store = store
        self._doubts = doubts
        self._refusals = refusals
        self._elections = StorageElections(clock)
        self._started_ms = (clock or SystemClock()).unix_ms()

    @_refuses
    def TakeStorageTurn(  # noqa: N802 - the protocol's name, as below
        self, request: mx_pb2.TakeStorageTurnRequest, context: grpc.ServicerContext
    ) -> mx_pb2.TakeStorageTurnResponse:
        key = _key(request, context)
        self._require_own(request)
        return self._elections.take(
            key, request.worker_id, request.epoch, lambda: self._others_were_starting(key, request.worker_id)
        )

    @_refuses
    def EndStorageTurn(  # noqa: N802
        self, request: mx_pb2.EndStorageTurnRequest, context: grpc.ServicerContext
    ) -> mx_pb2.EndStorageTurnResponse:
        key = _key(request, context)
        self._require_own(request)
        self._elections.end(key, request.worker_id, request.epoch, shared=request.shared)
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

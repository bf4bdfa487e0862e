"""Calls to one holder's gRPC services: deadlines, and errors as exceptions."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar, cast

import grpc

from mxcore.errors import SourceBusy, SourceRefused, SourceUnreachable, TransferError
from mxcore.transfer.layout import ChunkRequest, set_to_bytes
from mxserver.wire import SettingError
from mxserver.wire.calls import Closing, open_channel
from mxserver.wire.proto import mx_pb2, mx_pb2_grpc, p2p_pb2, p2p_pb2_grpc

__all__ = ["AGAIN_METADATA", "HAD_METADATA", "PendingCall", "Source", "SourceClient"]

Response = TypeVar("Response")

AGAIN_METADATA = "mx-again-ms"
"""Trailing metadata of a holder that is full: after how many milliseconds it wants to be asked again."""
HAD_METADATA = "mx-had-chunks"
"""Trailing metadata of a holder that is full: how many chunks it has, so that readers know whether to wait for it."""

_LONGEST_AGAIN_MS = 60_000  # whatever a holder says
_RELEASE_SECONDS = 1.0
_CANCELLED_RELEASE_SECONDS = 0.3  # the holder may be gone
_NO_ANSWER = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED)


class _Method(Protocol[Response]):
    def future(self, request: Any, *, timeout: float) -> grpc.Future[Response]: ...


@dataclass(frozen=True)
class Source:
    """A worker that has weights, as the server lists it. `endpoint` is host:port of its gRPC services.

    `owner` is the name that the server knows it by; empty where callers have none.
    """

    source_id: str
    worker_id: str
    worker_rank: int
    endpoint: str
    updated_at_ms: int = 0
    load: float = 0.0
    receiving: bool = False  # it has only a part yet
    owner: str = ""
    distance: int = 0  # by place (member/place.py); 0 is the nearest


class SourceClient(Closing):
    """One channel to one holder; a context manager. Thread-safe.

    All calls raise SourceUnreachable without an answer within the deadline (also when the holder is leaving), and
    SourceRefused when the answer is no.
    """

    def __init__(self, source: Source, *, timeout_seconds: float) -> None:
        self.source = source
        self.timeout_seconds = timeout_seconds
        try:
            self._channel = open_channel(source.endpoint, to_worker=True)
        except SettingError as error:
            raise SourceUnreachable(
                f"worker {source.worker_id} ({source.endpoint}) cannot be called: {error}"
            ) from error
        self._worker = p2p_pb2_grpc.WorkerServiceStub(self._channel)
        self._transfer = mx_pb2_grpc.TransferServiceStub(self._channel)
        self._lock = threading.Lock()
        self._running: set[grpc.Future[Any]] = set()
        self._cancelled = False

    def get_layout(self, fingerprint: str, known_digests: bytes = b"") -> mx_pb2.GetLayoutResponse:
        """What the holder has; with its layout only when that has another fingerprint.

        Without digests where these are `known_digests` (`ChunkDigests.summary`).
        """
        request = mx_pb2.GetLayoutRequest(
            mx_source_id=self.source.source_id,
            worker_id=self.source.worker_id,
            fingerprint=fingerprint,
            known_digests=known_digests,
        )
        return self._call("GetLayout", self._transfer.GetLayout, request)

    def prepare(self) -> str:
        """Takes a lease to read; returns its id."""
        request = p2p_pb2.PrepareTensorReadRequest(mx_source_id=self.source.source_id, worker_id=self.source.worker_id)
        return self._call("PrepareTensorRead", self._worker.PrepareTensorRead, request).lease_id

    def open_transfer(
        self,
        lease_id: str,
        fingerprint: str,
        metadata: bytes,
        extents: Sequence[mx_pb2.Extent],
        operation: mx_pb2.Operation.ValueType,
        *,
        device_memory: bool = False,
    ) -> mx_pb2.OpenTransferResponse:
        """Exchanges the agents' metadata and the addresses of the extents."""
        request = mx_pb2.OpenTransferRequest(
            mx_source_id=self.source.source_id,
            worker_id=self.source.worker_id,
            lease_id=lease_id,
            fingerprint=fingerprint,
            nixl_metadata=metadata,
            extents=extents,
            operation=operation,
            device_memory=device_memory,
        )
        return self._call("OpenTransfer", self._transfer.OpenTransfer, request)

    def ask(
        self,
        lease_id: str,
        wanted: ChunkRequest,
        count: int,
        *,
        known_version: int = 0,
        wait_seconds: float = 0.0,
        declined: Sequence[int] = (),
    ) -> PendingCall[mx_pb2.AskChunksResponse]:
        """Asks for some of `wanted`, out of `count` chunks; if the holder has none, it waits up to `wait_seconds`."""
        request = mx_pb2.AskChunksRequest(
            lease_id=lease_id,
            wanted=set_to_bytes(wanted.chunks, count),
            preferred=set_to_bytes(wanted.preferred, count),
            most=wanted.most,
            known_version=known_version,
            wait_ms=round(wait_seconds * 1000),
            declined=declined,
        )
        return self._begin("AskChunks", self._transfer.AskChunks, request)

    def push_chunks(self, lease_id: str, chunks: Sequence[int], timeout_seconds: float, *, notify: bool) -> Any:
        """Asks the holder to WRITE chunks; a gRPC stream of results, with `cancel`. Its errors: `as_error`."""
        request = mx_pb2.PushChunksRequest(lease_id=lease_id, chunks=chunks, notify=notify)
        return self._transfer.PushChunks(request, timeout=timeout_seconds)

    def stage_chunk(self, lease_id: str, chunk: int, slot: int) -> PendingCall[mx_pb2.StageChunkResponse]:
        """Asks the holder to copy a chunk into a slot of the lease's buffer."""
        request = mx_pb2.StageChunkRequest(lease_id=lease_id, chunk=chunk, slot=slot)
        return self._begin("StageChunk", self._transfer.StageChunk, request)

    def renew(self, lease_id: str) -> float:
        """Renews the lease; returns the seconds for which it holds."""
        request = mx_pb2.RenewLeaseRequest(lease_id=lease_id)
        return self._call("RenewLease", self._transfer.RenewLease, request).lease_ms / 1000

    def doubt(self, lease_id: str, chunks: Sequence[int]) -> None:
        """Tells the holder that these chunks did not have their digests. Waits for no answer, and never raises.

        Releases without this call have no answer.
        """
        request = mx_pb2.DoubtChunksRequest(lease_id=lease_id, chunks=chunks)
        with suppress(TransferError):
            call = self._begin("DoubtChunks", self._transfer.DoubtChunks, request)
            call.when_done(call.forget)

    def cancel(self) -> None:
        """Ends running calls with SourceUnreachable; afterwards only `release` can be called."""
        with self._lock:
            self._cancelled = True
            running = list(self._running)
        for call in running:
            call.cancel()

    def release(self, lease_id: str) -> None:
        """Ends the lease; waits for the answer for a second at most."""
        request = p2p_pb2.ReleaseTensorReadRequest(
            mx_source_id=self.source.source_id, worker_id=self.source.worker_id, lease_id=lease_id
        )
        try:
            longest = _CANCELLED_RELEASE_SECONDS if self._cancelled else _RELEASE_SECONDS
            self._worker.ReleaseTensorRead(request, timeout=min(self.timeout_seconds, longest))
        except grpc.RpcError as error:
            raise self.as_error("ReleaseTensorRead", error) from error

    def as_error(self, name: str, error: grpc.RpcError) -> TransferError:
        """The exception for a failed call."""
        call = cast(grpc.Call, error)
        text = (
            f"{name} at worker {self.source.worker_id} ({self.source.endpoint}): {call.code().name}: {call.details()}"
        )
        if call.code() in _NO_ANSWER:
            unreachable = SourceUnreachable(text)
            unreachable.late = call.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            return unreachable
        # NOT_FOUND: the lease has ended, perhaps for another reader; there may be a place again.
        if call.code() not in (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.NOT_FOUND):
            return SourceRefused(text)
        busy = SourceBusy(text)
        told = dict(call.trailing_metadata() or ())
        with suppress(TypeError, ValueError):
            busy.again_seconds = min(max(int(told.get(AGAIN_METADATA, 0)), 0), _LONGEST_AGAIN_MS) / 1000
        with suppress(TypeError, ValueError):
            busy.had_chunks = int(told[HAD_METADATA]) if HAD_METADATA in told else None
        return busy

    def close(self) -> None:
        """Closes the channel; idempotent."""
        self._channel.close()

    def _call(self, name: str, method: _Method[Response], request: object) -> Response:
        return self._begin(name, method, request).result()

    def _begin(self, name: str, method: _Method[Response], request: object) -> PendingCall[Response]:
        with self._lock:
            if self._cancelled:
                raise SourceUnreachable(f"{name} at worker {self.source.worker_id}: given up on")
            call = method.future(request, timeout=self.timeout_seconds)
            self._running.add(call)
        return PendingCall(name, call, self)

    def _ended(self, call: grpc.Future[Any]) -> None:
        with self._lock:
            self._running.discard(call)


class PendingCall(Generic[Response]):
    """A call that runs; wait for its `result`, or end it by `SourceClient.cancel`."""

    def __init__(self, name: str, call: grpc.Future[Response], client: SourceClient) -> None:
        self._name = name
        self._call = call
        self._client = client

    @property
    def done(self) -> bool:
        """Whether `result` returns or raises at once."""
        return self._call.done()

    def when_done(self, call: Callable[[], None]) -> None:
        """Calls this once it is `done`, on a thread of gRPC's."""
        self._call.add_done_callback(lambda _: call())

    def forget(self) -> None:
        """Its answer is of no interest."""
        self._client._ended(self._call)

    def result(self) -> Response:
        """The answer; waits for it."""
        try:
            answer: Response = self._call.result()
            return answer
        except grpc.FutureCancelledError as error:
            raise SourceUnreachable(f"{self._name} at worker {self._client.source.worker_id}: given up on") from error
        except grpc.RpcError as error:
            raise self._client.as_error(self._name, error) from error
        finally:
            self._client._ended(self._call)

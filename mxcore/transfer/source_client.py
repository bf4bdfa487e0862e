"""Calls to one holder's gRPC services: deadlines, and errors as exceptions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, TypeVar, cast

import grpc

from mxcore.errors import SourceRefused, SourceUnreachable, TransferError
from mxserver.wire import mx_pb2, mx_pb2_grpc, p2p_pb2, p2p_pb2_grpc
from mxserver.wire.channels import channel_options
from mxserver.wire.credentials import open_channel
from mxserver.wire.errors import SettingError

__all__ = ["Source", "SourceClient"]

Response = TypeVar("Response")

_NO_ANSWER = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED)


@dataclass(frozen=True)
class Source:
    """A worker that has weights, as the server lists it. `endpoint` is host:port of its gRPC services."""

    source_id: str
    worker_id: str
    worker_rank: int
    endpoint: str
    updated_at_ms: int = 0
    load: float = 0.0


class SourceClient:
    """One channel to one holder; a context manager. Thread-safe.

    All calls raise SourceUnreachable without an answer within the deadline (also when the holder is leaving), and
    SourceRefused when the answer is no.
    """

    def __init__(self, source: Source, *, timeout_seconds: float) -> None:
        self.source = source
        self.timeout_seconds = timeout_seconds
        try:
            self._channel = open_channel(source.endpoint, channel_options(), to_worker=True)
        except SettingError as error:
            raise SourceUnreachable(
                f"worker {source.worker_id} ({source.endpoint}) cannot be called: {error}"
            ) from error
        self._worker = p2p_pb2_grpc.WorkerServiceStub(self._channel)
        self._transfer = mx_pb2_grpc.TransferServiceStub(self._channel)

    def get_layout(self, fingerprint: str) -> mx_pb2.GetLayoutResponse:
        """What the holder has; with its layout only when that has another fingerprint."""
        request = mx_pb2.GetLayoutRequest(
            mx_source_id=self.source.source_id, worker_id=self.source.worker_id, fingerprint=fingerprint
        )
        return self._call("GetLayout", self._transfer.GetLayout, request)

    def prepare(self) -> str:
        """Takes a lease; returns its id."""
        request = p2p_pb2.PrepareTensorReadRequest(mx_source_id=self.source.source_id, worker_id=self.source.worker_id)
        return self._call("PrepareTensorRead", self._worker.PrepareTensorRead, request).lease_id

    def open_transfer(
        self,
        lease_id: str,
        fingerprint: str,
        metadata: bytes,
        extents: Sequence[mx_pb2.Extent],
        operation: mx_pb2.Operation.ValueType,
    ) -> mx_pb2.OpenTransferResponse:
        """Exchanges agents' metadata and addresses."""
        request = mx_pb2.OpenTransferRequest(
            mx_source_id=self.source.source_id,
            worker_id=self.source.worker_id,
            lease_id=lease_id,
            fingerprint=fingerprint,
            nixl_metadata=metadata,
            extents=extents,
            operation=operation,
        )
        return self._call("OpenTransfer", self._transfer.OpenTransfer, request)

    def push_chunks(self, lease_id: str, chunks: Sequence[int], timeout_seconds: float) -> Any:
        """Asks the holder to WRITE chunks; a gRPC stream of results, with `cancel`. Its errors: `as_error`."""
        return self._transfer.PushChunks(
            mx_pb2.PushChunksRequest(lease_id=lease_id, chunks=chunks), timeout=timeout_seconds
        )

    def renew(self, lease_id: str) -> float:
        """A sign of life; returns the seconds until the next one is due at the latest."""
        request = mx_pb2.RenewLeaseRequest(lease_id=lease_id)
        return self._call("RenewLease", self._transfer.RenewLease, request).lease_ms / 1000

    def release(self, lease_id: str) -> None:
        """Ends the lease."""
        request = p2p_pb2.ReleaseTensorReadRequest(
            mx_source_id=self.source.source_id, worker_id=self.source.worker_id, lease_id=lease_id
        )
        self._call("ReleaseTensorRead", self._worker.ReleaseTensorRead, request)

    def as_error(self, name: str, error: grpc.RpcError) -> TransferError:
        """The exception for a failed call."""
        call = cast(grpc.Call, error)
        text = (
            f"{name} at worker {self.source.worker_id} ({self.source.endpoint}): {call.code().name}: {call.details()}"
        )
        return SourceUnreachable(text) if call.code() in _NO_ANSWER else SourceRefused(text)

    def close(self) -> None:
        """Closes the channel; idempotent."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _call(self, name: str, method: Callable[..., Response], request: object) -> Response:
        try:
            return method(request, timeout=self.timeout_seconds)
        except grpc.RpcError as error:
            raise self.as_error(name, error) from error

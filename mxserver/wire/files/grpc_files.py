"""Files by StreamModelFiles: from servers without a port for files, and where only the port for calls is open."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grpc

from mxserver.wire.calls import ServerChannel
from mxserver.wire.credentials import ClientCredentials
from mxserver.wire.files.pieces import CallFailed, Piece
from mxserver.wire.proto import model_pb2, model_pb2_grpc


class GrpcFiles:
    """Reads over one channel, a call a file. Not thread-safe, except `abort`."""

    def __init__(self, address: str, credentials: ClientCredentials, request: model_pb2.ModelFilesRequest) -> None:
        """`request` says which model in which revision."""
        self._server = ServerChannel(address, credentials)
        self._request = request
        self._call: Any = None

    def pieces(self, path: str, offset: int, length: int | None) -> Iterator[Piece]:
        """The file's bytes from `offset` on, as the server cuts them; with their digests where a length is given.

        A server that knows no ranges begins at byte 0 whatever was asked for. Raises CallFailed.
        """
        request = model_pb2.ModelFilesRequest()
        request.CopyFrom(self._request)
        request.file_selector.paths.append(path)
        if offset or length is not None:
            request.ranges.add(relative_path=path, offset=offset, length=length or 0)
        request.chunk_digests = length is not None
        try:
            self._call = model_pb2_grpc.ModelServiceStub(self._server.channel()).StreamModelFiles(request)
            for chunk in self._call:
                digest = chunk.data_digest if chunk.HasField("data_digest") else None
                yield Piece(chunk.relative_path, chunk.offset, memoryview(chunk.data), digest)
        except grpc.RpcError as error:
            raise CallFailed(error.code(), error.details() or "") from error
        except ValueError as error:  # what grpcio raises for a call on a closed channel
            raise CallFailed(grpc.StatusCode.CANCELLED, str(error)) from error
        finally:
            self.abort()

    def abort(self) -> None:
        """Ends a call that runs in another thread: CallFailed there."""
        if (call := self._call) is not None:
            call.cancel()

    def close(self) -> None:
        """Idempotent."""
        self.abort()
        self._server.close()

"""The bytes of a server's files: by HTTP where its port for files can be reached, else over gRPC."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator

from mxserver.wire.calls import Closing
from mxserver.wire.credentials import ClientCredentials
from mxserver.wire.files.grpc_files import GrpcFiles
from mxserver.wire.files.http_files import HttpFiles, NotThere
from mxserver.wire.files.pieces import FilesPlace, Piece
from mxserver.wire.proto import model_pb2

_LOG = logging.getLogger(__name__)


class PortState:
    """Whether a server's port for files can be reached, for all streams of one client. Thread-safe."""

    def __init__(self, address: str, *, is_closed: bool = False) -> None:
        """`is_closed`: it is not to be used, by the caller's own choice, of which nothing is said."""
        self._address = address
        self._lock = threading.Lock()
        self._said = is_closed
        self.is_closed = is_closed

    def cannot_be_used(self, reason: str, *, for_good: bool = True) -> None:
        """Files come over gRPC, from now on where it is `for_good`. Says so once."""
        with self._lock:
            self.is_closed = self.is_closed or for_good
            said, self._said = self._said, True
        if not said:
            _LOG.warning("files of %s come over gRPC, which is slower: %s", self._address, reason)


class FileSource(Closing):
    """Reads pieces of files, one file after the other. Not thread-safe, except `abort`."""

    def __init__(
        self,
        address: str,
        credentials: ClientCredentials | None,
        request: model_pb2.ModelFilesRequest,
        place: FilesPlace | None,
        port: PortState,
    ) -> None:
        """`request` says which model in which revision; `place` is None for a server that has no port for files.

        Raises SettingError: certificates or a token that cannot be used.
        """
        credentials = credentials or ClientCredentials.from_environ()
        self._address = address
        self._port = port
        self._place = place
        self._http = HttpFiles(address, credentials, place) if place else None
        self._grpc = GrpcFiles(address, credentials, request)

    def blocks(self, path: str, offset: int, length: int, file_digest: str = "") -> Iterator[Piece]:
        """The file's bytes [offset, offset + length), each block valid until the next one. A server that knows no
        ranges begins at byte 0. Raises CallFailed; also where the file has another digest by now, if one is given.
        """
        yield from self._either(
            lambda http: http.blocks(path, offset, length, file_digest), self._grpc.pieces(path, offset, None)
        )

    def pieces(self, path: str, offset: int, into: memoryview) -> Iterator[Piece]:
        """The file's bytes from `offset` on, as many as `into` has, with digests where the server tells them. By HTTP
        they are in `into` when their piece comes; over gRPC they are to be copied there. Raises CallFailed.
        """
        yield from self._either(
            lambda http: http.pieces(path, offset, into), self._grpc.pieces(path, offset, len(into))
        )

    def _either(self, by_http: Callable[[HttpFiles], Iterator[Piece]], by_grpc: Iterator[Piece]) -> Iterator[Piece]:
        """`by_grpc` is a generator: its call begins with its first piece."""
        if (http := self._usable()) is not None:
            try:
                yield from by_http(http)
            except NotThere as error:
                self._without(error)
            else:
                return
        yield from by_grpc

    def _usable(self) -> HttpFiles | None:
        if self._http is None:
            self._port.cannot_be_used("the server tells of no port for files")
        return None if self._port.is_closed else self._http

    def _without(self, error: NotThere) -> None:
        """A port that has worked may be there again later: its server may be starting."""
        port = self._place.port if self._place else 0
        has_worked = self._http is not None and self._http.has_worked
        self._port.cannot_be_used(f"its port for files, {port}, cannot be used ({error})", for_good=not has_worked)

    def abort(self) -> None:
        """Ends a read that runs in another thread: CallFailed there."""
        if self._http is not None:
            self._http.abort()
        self._grpc.abort()

    def close(self) -> None:
        """Idempotent."""
        if self._http is not None:
            self._http.close()
        self._grpc.close()

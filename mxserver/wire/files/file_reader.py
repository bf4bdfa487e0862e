"""Parts of a cached model's files, received straight into the caller's memory."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import grpc
import xxhash

from mxserver.wire.calls import Closing, Patience
from mxserver.wire.credentials import ClientCredentials
from mxserver.wire.errors import FileRefused, ServerRefused, ServerUnreachable, WireError
from mxserver.wire.files.file_source import FileSource, PortState
from mxserver.wire.files.model_stream import BROKEN, MAX_CONTENT_ATTEMPTS
from mxserver.wire.files.pieces import CallFailed, FilesPlace, Piece
from mxserver.wire.proto import model_pb2


class FileReader(Closing):
    """Reads parts of the files of one revision of a model. Made by `ModelClient.reader`; `close` must be called.

    Not thread-safe, except `abort`: use one for each thread, each has its own connection. Bytes go from the socket into
    the caller's memory, where each chunk is compared with the digest that the server made when it read the chunk.
    After a broken connection the read goes on with the first incomplete chunk.
    """

    def __init__(
        self,
        address: str,
        credentials: ClientCredentials | None,
        request: model_pb2.ModelFilesRequest,
        place: FilesPlace | None,
        port: PortState,
        *,
        patience_seconds: float,
        as_error: Callable[[str, grpc.RpcError], WireError],
    ) -> None:
        """`request` says which model in which revision; `place` where its files are by HTTP."""
        self._address = address
        self._patience_seconds = patience_seconds
        self._as_error = as_error
        self._source = FileSource(address, credentials, request, place, port)
        self._stop = threading.Event()
        self.bytes_received = 0
        self.bytes_unverified = 0  # from servers that send no digests
        self.breaks = 0

    def read_into(
        self, path: str, offset: int, into: memoryview, *, on_bytes: Callable[[int], None] = lambda _: None
    ) -> None:
        """Fills `into` (bytes, writable, contiguous) with the file's bytes from `offset` on. `on_bytes` is called
        with the number of bytes of each verified chunk. The content of `into` after an error is undefined.

        Raises:
            ModelNotFound: the server has no such file.
            FileRefused: a chunk's digest was wrong three times, or the server sends what was not asked for.
            ServerRefused: the range is not in the file, or the server knows no ranges.
            ServerUnreachable: no answer for `patience_seconds`, or `abort` was called.
        """
        into = into.cast("B")
        patience = Patience(self._patience_seconds, self._stop)
        done = attempts = 0
        while done < len(into):
            if self._stop.is_set():
                raise ServerUnreachable(f"{path} was not read to its end from {self._address}: the read was aborted")
            before = done
            try:
                for count in self._chunks(path, offset + done, into[done:]):
                    done += count
                    on_bytes(count)
            except CallFailed as error:
                if done != before:
                    patience.heard()
                if error.code() not in BROKEN or not patience.wait():
                    raise self._as_error("StreamModelFiles", error) from error
                self.breaks += 1
            except FileRefused:
                attempts += 1
                if attempts >= MAX_CONTENT_ATTEMPTS:
                    raise

    def _chunks(self, path: str, offset: int, into: memoryview) -> Iterator[int]:
        """Fills `into` in one call, and yields the number of bytes of each verified chunk."""
        done = 0
        for piece in self._source.pieces(path, offset, into):
            count = len(piece.data)
            self._check_place(piece, path, offset + done, len(into) - done)
            self._check_digest(piece)
            into[done : done + count] = piece.data  # costs nothing where it is there already
            done += count
            self.bytes_received += count
            yield count
        if done < len(into):
            raise ServerUnreachable(f"{self._address} ended the stream {len(into) - done} bytes early, in {path}")

    def _check_place(self, piece: Piece, path: str, offset: int, room: int) -> None:
        if piece.path != path:
            raise FileRefused(f"{self._address} sent {piece.path[:200]!r}, which was not asked for")
        if piece.offset != offset or len(piece.data) > room:
            raise ServerRefused(
                f"{self._address} sent {len(piece.data)} bytes of {path} from {piece.offset}, but {room} from {offset} "
                "were asked for; it may not support ranges: fetch whole files from it"
            )

    def _check_digest(self, piece: Piece) -> None:
        if piece.digest is None:
            self.bytes_unverified += len(piece.data)
            return
        digest = xxhash.xxh3_64_intdigest(piece.data) if piece.received is None else piece.received
        if digest != piece.digest:
            raise FileRefused(
                f"{piece.path} from {piece.offset}: {len(piece.data)} bytes have the digest {digest:016x}, not "
                f"{piece.digest:016x}"
            )

    def abort(self) -> None:
        """Ends a read that runs in another thread. All later reads fail too."""
        self._stop.set()
        self._source.abort()

    def close(self) -> None:
        """Idempotent."""
        self._source.close()

"""Parts of a cached model's files, received straight into the caller's memory."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import grpc
import xxhash

from mxserver.wire.calls import Closing, Patience
from mxserver.wire.credentials import ClientCredentials
from mxserver.wire.errors import FileRefused, ServerRefused, ServerUnreachable, WireError
from mxserver.wire.files.file_chunk import ChunkReader
from mxserver.wire.files.model_stream import BROKEN, MAX_CONTENT_ATTEMPTS, METHOD
from mxserver.wire.files.stream_call import CallFailed, StreamConnection
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
        *,
        patience_seconds: float,
        as_error: Callable[[str, grpc.RpcError], WireError],
    ) -> None:
        """`request` says which model in which revision."""
        self._address = address
        self._request = request
        self._patience_seconds = patience_seconds
        self._as_error = as_error
        self._connection = StreamConnection(address, credentials)
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
        request = model_pb2.ModelFilesRequest()
        request.CopyFrom(self._request)
        request.file_selector.paths.append(path)
        request.ranges.add(relative_path=path, offset=offset, length=len(into))
        request.chunk_digests = True
        self._connection.call(METHOD, request.SerializeToString())
        reader = ChunkReader(self._connection)
        done = 0
        while (fields := reader.next_fields()) is not None:
            count = reader.data_bytes
            self._check_place(fields, path, offset + done, count, len(into) - done)
            data = into[done : done + count]
            reader.read_into(data)
            self._check_digest(fields, data)
            done += count
            self.bytes_received += count
            yield count
        if done < len(into):
            raise ServerUnreachable(f"{self._address} ended the stream {len(into) - done} bytes early, in {path}")

    def _check_place(self, fields: model_pb2.FileChunk, path: str, offset: int, count: int, room: int) -> None:
        if fields.relative_path != path:
            raise FileRefused(f"{self._address} sent {fields.relative_path[:200]!r}, which was not asked for")
        if fields.offset != offset or count > room:
            raise ServerRefused(
                f"{self._address} sent {count} bytes of {path} from {fields.offset}, but {room} from {offset} were "
                "asked for; it may not support ranges: fetch whole files from it"
            )

    def _check_digest(self, fields: model_pb2.FileChunk, data: memoryview) -> None:
        if not fields.HasField("data_digest"):
            self.bytes_unverified += len(data)
        elif (digest := xxhash.xxh3_64_intdigest(data)) != fields.data_digest:
            raise FileRefused(
                f"{fields.relative_path} from {fields.offset}: {len(data)} bytes have the digest {digest:016x}, "
                f"not {fields.data_digest:016x}"
            )

    def abort(self) -> None:
        """Ends a read that runs in another thread. All later reads fail too."""
        self._stop.set()
        self._connection.abort()

    def close(self) -> None:
        """Idempotent."""
        self._connection.close()

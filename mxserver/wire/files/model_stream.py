"""Model files from a server into a folder: several streams at once, resumed after breaks, checked at the end."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import grpc

from mxserver.wire.calls import Patience
from mxserver.wire.credentials import ClientCredentials
from mxserver.wire.errors import FileRefused, ServerUnreachable, WireError
from mxserver.wire.files.file_chunk import ChunkReader
from mxserver.wire.files.partial_file import FileInfo, PartialFile
from mxserver.wire.files.stream_call import CallFailed, StreamConnection
from mxserver.wire.proto import model_pb2

METHOD = "/model_express.model.ModelService/StreamModelFiles"

MAX_CONTENT_ATTEMPTS = 3
_BATCH_BYTES = 16 * 1024 * 1024  # small files share a call
BROKEN = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.CANCELLED,  # of a call that ended with the server
    grpc.StatusCode.INTERNAL,  # a proxy reset the stream
    grpc.StatusCode.UNKNOWN,
)


@dataclass(slots=True)
class FetchReport:
    """What a fetch did. `resent_bytes` were received twice because a stream broke."""

    files: int = 0
    files_kept: int = 0  # there already, with the right bytes
    files_verified: int = 0  # against a digest of the server; the others by their size alone
    bytes_received: int = 0
    bytes_resumed: int = 0  # left over from an earlier fetch
    resent_bytes: int = 0
    breaks: int = 0
    seconds: float = 0.0


class FolderFetch:
    """One fetch into a folder, by `run`. `on_bytes` is called with the size of each chunk in bytes, from any thread."""

    def __init__(
        self,
        address: str,
        credentials: ClientCredentials | None,
        request: model_pb2.ModelFilesRequest,
        folder: Path,
        beside: Path,
        *,
        streams: int,
        patience_seconds: float,
        on_bytes: Callable[[int], None],
        as_error: Callable[[str, grpc.RpcError], WireError],
    ) -> None:
        """`request` says which model; `beside` is a folder for incomplete files, on the same file system."""
        self._address = address
        self._credentials = credentials
        self._request = request
        self._folder = folder
        self._beside = beside
        self._streams = streams
        self._patience_seconds = patience_seconds
        self._on_bytes = on_bytes
        self._as_error = as_error
        self._lock = threading.Lock()
        self._failed = threading.Event()
        self._open: list[StreamConnection] = []
        self.report = FetchReport()

    def run(self, files: list[FileInfo]) -> None:
        """Raises the error of the first stream that fails, and ends the others."""
        batches: queue.SimpleQueue[list[FileInfo]] = queue.SimpleQueue()
        made = _batches(files)
        for batch in made:
            batches.put(batch)
        errors: list[BaseException] = []

        def work() -> None:
            try:
                self._one_stream(batches)
            except BaseException as error:  # noqa: BLE001 - raised again below
                errors.append(error)
                self._end_all()

        count = min(self._streams, len(made))
        threads = [threading.Thread(target=work, name=f"stream-{number}", daemon=True) for number in range(count)]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                thread.join()
        except BaseException:  # Ctrl-C
            self._end_all()
            raise
        if errors:
            raise errors[0]

    def _end_all(self) -> None:
        self._failed.set()
        with self._lock:
            for connection in self._open:
                connection.abort()

    def _one_stream(self, batches: queue.SimpleQueue[list[FileInfo]]) -> None:
        # One connection each: one TCP connection is slower than several.
        with StreamConnection(self._address, self._credentials) as connection:
            with self._lock:
                self._open.append(connection)
            buffer = bytearray()
            while not self._failed.is_set():
                try:
                    batch = batches.get_nowait()
                except queue.Empty:
                    return
                buffer = self._batch(connection, batch, buffer)

    def _batch(self, connection: StreamConnection, batch: list[FileInfo], buffer: bytearray) -> bytearray:
        """`buffer` holds one chunk at a time; if it was too small, a larger one is returned."""
        partials = {info.path: PartialFile(info, self._beside) for info in batch}
        with self._lock:
            self.report.bytes_resumed += sum(partial.offset for partial in partials.values())
        for partial in partials.values():
            self._on_bytes(partial.offset)
        attempts = 0
        patience = Patience(self._patience_seconds, self._failed)
        try:
            while partials and not self._failed.is_set():
                before = self.report.bytes_received
                try:
                    buffer = self._receive(connection, partials, buffer)
                except CallFailed as error:
                    if self.report.bytes_received != before:
                        patience.heard()
                    self._after_break(error, patience)
                except FileRefused:
                    connection.close()
                    attempts += 1
                    if attempts >= MAX_CONTENT_ATTEMPTS:
                        raise
        finally:
            for partial in partials.values():
                partial.close()
        return buffer

    def _after_break(self, error: CallFailed, patience: Patience) -> None:
        """Returns to try again, or raises."""
        if error.code() not in BROKEN or not patience.wait():
            raise self._as_error("StreamModelFiles", error) from error
        with self._lock:
            self.report.breaks += 1

    def _receive(self, connection: StreamConnection, partials: dict[str, PartialFile], buffer: bytearray) -> bytearray:
        """Receives what is missing of some files. Files that are complete leave `partials`."""
        request = model_pb2.ModelFilesRequest()
        request.CopyFrom(self._request)
        request.file_selector.paths.extend(partials)
        request.ranges.extend(
            model_pb2.FileRange(relative_path=path, offset=partial.offset)
            for path, partial in partials.items()
            if partial.offset
        )
        connection.call(METHOD, request.SerializeToString())
        reader = ChunkReader(connection)
        while not self._failed.is_set() and (fields := reader.next_fields()) is not None:
            if reader.data_bytes > len(buffer):
                buffer = bytearray(reader.data_bytes)
            data = memoryview(buffer)[: reader.data_bytes]
            reader.read_into(data)
            self._take(fields, data, partials)
        if partials and not self._failed.is_set():
            raise ServerUnreachable(f"{self._address} ended the stream before {sorted(partials)[0]} was complete")
        return buffer

    def _take(self, chunk: model_pb2.FileChunk, data: memoryview, partials: dict[str, PartialFile]) -> None:
        partial = partials.get(chunk.relative_path)
        if partial is None:
            raise FileRefused(f"{self._address} sent {chunk.relative_path[:200]!r}, which was not asked for")
        if chunk.offset != partial.offset:
            if chunk.offset:
                raise FileRefused(f"{partial.info.path}: expected byte {partial.offset}, but got byte {chunk.offset}")
            with self._lock:  # a server without ranges starts at the beginning
                self.report.resent_bytes += partial.offset
            partial.restart()
        partial.append(data)
        with self._lock:
            self.report.bytes_received += len(data)
        self._on_bytes(len(data))
        if chunk.is_last_chunk:
            partial.finish(self._folder)
            del partials[chunk.relative_path]
            with self._lock:
                self.report.files += 1
                self.report.files_verified += bool(partial.info.digest)


def _batches(files: list[FileInfo]) -> list[list[FileInfo]]:
    """Large files first, each in a call of its own; small ones together."""
    made: list[list[FileInfo]] = []
    room = 0
    for info in sorted(files, key=lambda info: -info.size):
        if info.size > room or not made:
            made.append([])
            room = _BATCH_BYTES
        made[-1].append(info)
        room -= info.size
    return made

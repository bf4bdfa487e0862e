"""Model files from a server into a folder: several streams at once, resumed after breaks, checked at the end."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import grpc

from mxserver.wire import model_pb2
from mxserver.wire.ahead import made_ahead
from mxserver.wire.channels import channel_options
from mxserver.wire.credentials import ClientCredentials, Connection
from mxserver.wire.errors import FileRefused, ServerUnreachable, WireError
from mxserver.wire.file_chunk import BadMessage, split_chunk
from mxserver.wire.partial_file import FileInfo, PartialFile

METHOD = "/model_express.model.ModelService/StreamModelFiles"

MAX_CONTENT_ATTEMPTS = 3
MESSAGES_AHEAD = 4
WINDOW_BYTES = 16 * 1024 * 1024  # what may be on its way to one stream
MAX_FRAME_BYTES = 16 * 1024 * 1024 - 1  # HTTP/2's limit (RFC 9113, 6.5.2)
_BATCH_BYTES = 16 * 1024 * 1024  # small files share a call
_BROKEN = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.CANCELLED,  # what a call gets that is cut by the server's end
    grpc.StatusCode.INTERNAL,  # a reset of the stream on the way
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


def stream_options() -> list[tuple[str, int]]:
    """Options of a channel that receives files. A window and frames of this size let the server send while the
    client works on what has come; with gRPC's own, each waits for the other after every 64 KiB to some MiB.
    """
    return [
        *channel_options(),
        ("grpc.http2.lookahead_bytes", WINDOW_BYTES),
        ("grpc.http2.max_frame_size", MAX_FRAME_BYTES),
        # A connection of its own for each: one TCP connection is slower than several.
        ("grpc.use_local_subchannel_pool", 1),
    ]


@contextmanager
def read_ahead(call: Any) -> Iterator[Iterator[bytes]]:
    """The messages of a call, received by a thread of its own while earlier ones are worked on; a few at most lie
    ready. The call is cancelled at the end.
    """
    try:
        yield made_ahead(call, MESSAGES_AHEAD, "receive")
    finally:
        call.cancel()


class FolderFetch:
    """One fetch into a folder, by `run`. `on_bytes` is called with the bytes of each chunk, from any thread."""

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
        """`request` says which model; `beside` is a folder for what is not whole yet, on the same file system."""
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
        self.report = FetchReport()

    def run(self, files: list[FileInfo]) -> None:
        """Raises what the first stream that failed raised; the others are ended then."""
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
                self._failed.set()

        count = min(self._streams, len(made))
        threads = [threading.Thread(target=work, name=f"stream-{number}", daemon=True) for number in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]

    def _one_stream(self, batches: queue.SimpleQueue[list[FileInfo]]) -> None:
        connection = Connection(self._address, stream_options(), self._credentials)
        try:
            serializer = model_pb2.ModelFilesRequest.SerializeToString
            while not self._failed.is_set():
                call: Any = connection.channel().unary_stream(METHOD, request_serializer=serializer)
                try:
                    batch = batches.get_nowait()
                except queue.Empty:
                    return
                self._batch(call, batch)
        finally:
            connection.close()

    def _batch(self, call: Any, batch: list[FileInfo]) -> None:
        partials = {info.path: PartialFile(info, self._beside) for info in batch}
        with self._lock:
            self.report.bytes_resumed += sum(partial.offset for partial in partials.values())
        for partial in partials.values():
            self._on_bytes(partial.offset)
        attempts = 0
        heard_at = time.monotonic()
        try:
            while partials and not self._failed.is_set():
                before = self.report.bytes_received
                try:
                    self._receive(call, partials)
                except grpc.RpcError as error:
                    if self.report.bytes_received != before:
                        heard_at = time.monotonic()
                    self._after_break(error, heard_at)
                except FileRefused:
                    attempts += 1
                    if attempts >= MAX_CONTENT_ATTEMPTS:
                        raise
        finally:
            for partial in partials.values():
                partial.close()

    def _after_break(self, error: grpc.RpcError, heard_at: float) -> None:
        """Returns to try again, or raises."""
        if cast("grpc.Call", error).code() not in _BROKEN:  # every RpcError of an invocation is one
            raise self._as_error("StreamModelFiles", error) from error
        if time.monotonic() - heard_at > self._patience_seconds:
            raise self._as_error("StreamModelFiles", error) from error
        with self._lock:
            self.report.breaks += 1
        self._failed.wait(0.2)

    def _receive(self, call: Any, partials: dict[str, PartialFile]) -> None:
        """Receives what is missing of some files. Files that are complete leave `partials`."""
        request = model_pb2.ModelFilesRequest()
        request.CopyFrom(self._request)
        request.file_selector.paths.extend(partials)
        request.ranges.extend(
            model_pb2.FileRange(relative_path=path, offset=partial.offset)
            for path, partial in partials.items()
            if partial.offset
        )
        with read_ahead(call(request, wait_for_ready=True)) as stream:
            for message in stream:
                if self._failed.is_set():
                    return
                self._take(message, partials)
        if partials:
            raise ServerUnreachable(f"{self._address} ended the stream before {sorted(partials)[0]} was complete")

    def _take(self, message: bytes, partials: dict[str, PartialFile]) -> None:
        try:
            chunk, data = split_chunk(message)
        except BadMessage as error:
            raise FileRefused(f"{self._address} sent a chunk that cannot be read: {error}") from error
        partial = partials.get(chunk.relative_path)
        if partial is None:
            raise FileRefused(f"{self._address} sent {chunk.relative_path[:200]!r}, which was not asked for")
        if chunk.offset != partial.offset:
            if chunk.offset:
                raise FileRefused(f"{partial.info.path}: byte {partial.offset} was to come, not {chunk.offset}")
            with self._lock:  # a server that knows no ranges begins at the beginning
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

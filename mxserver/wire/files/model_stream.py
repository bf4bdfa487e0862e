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
from mxserver.wire.files.file_source import FileSource, PortState
from mxserver.wire.files.partial_file import FileInfo, PartialFile
from mxserver.wire.files.pieces import CallFailed, FilesPlace, Piece
from mxserver.wire.proto import model_pb2

MAX_CONTENT_ATTEMPTS = 3
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
        place: FilesPlace | None,
        port: PortState,
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
        self._place = place
        self._port = port
        self._streams = streams
        self._patience_seconds = patience_seconds
        self._on_bytes = on_bytes
        self._as_error = as_error
        self._lock = threading.Lock()
        self._failed = threading.Event()
        self._open: list[FileSource] = []
        self.report = FetchReport()

    def run(self, files: list[FileInfo]) -> None:
        """Raises the error of the first stream that fails, and ends the others."""
        waiting: queue.SimpleQueue[FileInfo] = queue.SimpleQueue()
        for info in sorted(files, key=lambda info: -info.size):  # large ones first
            waiting.put(info)
        errors: list[BaseException] = []

        def work() -> None:
            try:
                self._one_stream(waiting)
            except BaseException as error:  # noqa: BLE001 - raised again below
                errors.append(error)
                self._end_all()

        count = min(self._streams, len(files))
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
            for source in self._open:
                source.abort()

    def _one_stream(self, files: queue.SimpleQueue[FileInfo]) -> None:
        # One connection each: one TCP connection is slower than several.
        with FileSource(self._address, self._credentials, self._request, self._place, self._port) as source:
            with self._lock:
                self._open.append(source)
            while not self._failed.is_set():
                try:
                    info = files.get_nowait()
                except queue.Empty:
                    return
                self._one_file(source, info)

    def _one_file(self, source: FileSource, info: FileInfo) -> None:
        partial = PartialFile(info, self._beside)
        with self._lock:
            self.report.bytes_resumed += partial.offset
        self._on_bytes(partial.offset)
        attempts = 0
        patience = Patience(self._patience_seconds, self._failed)
        try:
            while not self._failed.is_set():
                before = partial.offset
                try:
                    self._receive(source, partial)
                except CallFailed as error:
                    if partial.offset > before:
                        patience.heard()
                    self._after_break(error, patience)
                except FileRefused:
                    attempts += 1
                    if attempts >= MAX_CONTENT_ATTEMPTS:
                        raise
                else:
                    return
        finally:
            partial.close()

    def _after_break(self, error: CallFailed, patience: Patience) -> None:
        """Returns to try again, or raises."""
        if error.code() not in BROKEN or not patience.wait():
            raise self._as_error("StreamModelFiles", error) from error
        with self._lock:
            self.report.breaks += 1

    def _receive(self, source: FileSource, partial: PartialFile) -> None:
        """Receives what is missing of a file, and gives it its name."""
        info = partial.info
        if partial.offset < info.size:
            for piece in source.blocks(info.path, partial.offset, info.size - partial.offset, info.digest):
                if self._failed.is_set():
                    return
                self._take(piece, partial)
        if partial.offset < info.size:
            raise ServerUnreachable(f"{self._address} ended the stream before {info.path} was complete")
        partial.finish(self._folder)
        with self._lock:
            self.report.files += 1
            self.report.files_verified += bool(info.digest)

    def _take(self, piece: Piece, partial: PartialFile) -> None:
        if piece.path != partial.info.path:
            raise FileRefused(f"{self._address} sent {piece.path[:200]!r}, which was not asked for")
        if piece.offset != partial.offset:
            if piece.offset:
                raise FileRefused(f"{partial.info.path}: expected byte {partial.offset}, but got byte {piece.offset}")
            with self._lock:  # a server without ranges starts at the beginning
                self.report.resent_bytes += partial.offset
            partial.restart()
        partial.append(piece.data)
        with self._lock:
            self.report.bytes_received += len(piece.data)
        self._on_bytes(len(piece.data))

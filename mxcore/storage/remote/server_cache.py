"""Model files of the server's cache: in a folder that both see, or by HTTP, straight into memory or onto the disk."""

from __future__ import annotations

import ctypes
import queue
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from mxcore.errors import CheckpointError, StorageError
from mxcore.storage.remote.remote_folder import RemoteFile, RemoteRange, is_small
from mxserver.wire.files import FileReader, ModelClient, ModelFiles, has_content

__all__ = ["ServerFolder", "has_weights", "same_files_here"]

STREAMS = 4
PIECE_BYTES = 16 * 1024 * 1024
DIGESTED_BYTES = 64 * 1024 * 1024  # small files up to this size are compared byte by byte


def has_weights(listed: ModelFiles) -> bool:
    """Whether the cache has more of a model than configuration and tokenizer."""
    return any(not is_small(info.path) for info in listed.files)


def same_files_here(listed: ModelFiles) -> tuple[Path | None, str]:
    """The folder of the server's cache, if this machine sees the very same files there, and why (not).

    All sizes are compared, and of the index and the other small files the digests that the server recorded.
    """
    folder = listed.folder
    if folder is None:
        return None, "the server does not tell where its files lie"
    compared = 0
    for info in listed.files:
        try:
            size_bytes = (folder / info.path).stat().st_size
        except OSError as error:
            return None, f"{folder} is not the server's folder here: {info.path}: {error.strerror}"
        if size_bytes != info.size:
            return None, f"{folder} has other files here: {info.path} has {size_bytes} bytes, not {info.size}"
        if is_small(info.path) and info.size <= DIGESTED_BYTES and info.digest:
            if not has_content(folder / info.path, info):
                return None, f"{folder} has other files here: {info.path} has another digest"
            compared += 1
    if not compared:
        return None, f"{folder} cannot be told from another one: the server gives no digests"
    return folder, f"{folder}: {len(listed.files)} files of the same sizes, {compared} of the same digests"


class ServerFolder:
    """A model of the server's cache as a `RemoteFolder`, over several streams. Thread-safe; `close` must be called.

    Every chunk is checked against the server's digest as it arrives; broken streams go on where they were. Calls raise
    WireError and its kin (ServerUnreachable, FileRefused).
    """

    def __init__(self, client: ModelClient, model: str, listed: ModelFiles, *, streams: int = STREAMS) -> None:
        self.name = f"{model} in the cache of {client.address}"
        self.files = tuple(sorted(RemoteFile(info.path, info.size, info.digest) for info in listed.files))
        if not self.files:
            raise CheckpointError(f"{self.name}: no files")
        self._sizes = {file.path: file.size_bytes for file in self.files}
        self._readers: list[FileReader] = [
            client.reader(model, revision=listed.revision, place=listed.place) for _ in range(streams)
        ]
        self._free: queue.SimpleQueue[FileReader] = queue.SimpleQueue()
        for reader in self._readers:
            self._free.put(reader)
        self._pool = ThreadPoolExecutor(streams, thread_name_prefix="mx-server-files")

    @property
    def bytes_received(self) -> int:
        """Over all streams."""
        return sum(reader.bytes_received for reader in self._readers)

    @contextmanager
    def _reader(self) -> Iterator[FileReader]:
        reader = self._free.get()
        try:
            yield reader
        finally:
            self._free.put(reader)

    def whole(self, path: str) -> bytes:
        """A small file."""
        if path not in self._sizes:
            raise StorageError(f"{self.name}: there is no {path}", file=path)
        data = bytearray(self._sizes[path])
        if data:
            with self._reader() as reader, memoryview(data) as view:
                reader.read_into(path, 0, view)
        return bytes(data)

    def read_into(self, ranges: Sequence[RemoteRange]) -> None:
        """All ranges, in pieces side by side; returns, or raises, when no stream writes any more."""
        started = [self._pool.submit(self._piece, piece) for piece in _pieces(ranges)]
        errors = [error for future in started if (error := future.exception()) is not None]
        if errors:
            raise errors[0]

    def _piece(self, piece: RemoteRange) -> None:
        memory = (ctypes.c_char * piece.length).from_address(piece.address)
        with self._reader() as reader, memoryview(memory) as view:
            reader.read_into(piece.path, piece.offset, view)

    def check_unchanged(self) -> None:
        """Nothing: a revision of the cache never changes."""

    def close(self) -> None:
        """Idempotent."""
        self._pool.shutdown(wait=True)
        for reader in self._readers:
            reader.close()


def _pieces(ranges: Sequence[RemoteRange]) -> Iterator[RemoteRange]:
    for path, offset, length, address in ranges:
        for begin in range(0, length, PIECE_BYTES):
            yield RemoteRange(path, offset + begin, min(PIECE_BYTES, length - begin), address + begin)

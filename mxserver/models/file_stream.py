"""Which bytes of which files a stream sends, and the stream's messages."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from mxserver.models.errors import BadModelName, ModelError, ModelNotCached
from mxserver.models.message import FileTooShort, chunk_message
from mxserver.models.names import is_commit, is_weight
from mxserver.models.record import FileRecord, ModelRecord
from mxserver.wire import open_regular_below, path_problem
from mxserver.wire.proto import model_pb2

DEFAULT_CHUNK_BYTES = 1024 * 1024
MIN_CHUNK_BYTES = 64 * 1024
MAX_CHUNK_BYTES = 8 * 1024 * 1024


class FileDamaged(ModelError):
    """A cached file differs from its record; the model must be removed and downloaded again."""

    code = "MX_FILE_DAMAGED"


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch of a file, [begin, end) in bytes."""

    file: FileRecord
    begin: int
    end: int


def chunk_bytes(asked: int) -> int:
    """The size of a chunk's data; 0 means that the server chooses."""
    return min(max(asked, MIN_CHUNK_BYTES), MAX_CHUNK_BYTES) if asked else DEFAULT_CHUNK_BYTES


def selected_files(record: ModelRecord, request: model_pb2.ModelFilesRequest) -> list[FileRecord]:
    """The files that are asked for, in the order of the record.

    Raises:
        BadModelName: a path that cannot be one of a model.
        ModelNotCached: a file is missing, or the weights were never downloaded.
    """
    key = record.key
    wanted = set(request.file_selector.paths)
    for path in (*wanted, *(one.relative_path for one in request.ranges)):
        if problem := path_problem(path):
            raise BadModelName(f"file {path[:200]!r} of {key.model.name} is refused: {problem}")
    if missing := sorted(wanted - {file.path for file in record.files}):
        raise ModelNotCached(f"{key} has no file {missing[0]!r} in the cache")
    if not wanted and not record.has_weights and not request.ignore_weights:
        raise ModelNotCached(f"{key} is cached without its weights; download them with: mx models get {key.model.name}")
    return [
        file
        for file in record.files
        if (file.path in wanted or not wanted) and not (request.ignore_weights and is_weight(file.path))
    ]


def spans(files: list[FileRecord], request: model_pb2.ModelFilesRequest) -> list[Span]:
    """Raises BadModelName for a range that the file does not have, or of a file that is not sent."""
    ranges = {one.relative_path: one for one in request.ranges}
    if len(ranges) != len(request.ranges):
        raise BadModelName("a file has two ranges; only one per file is possible")
    if foreign := sorted(set(ranges) - {file.path for file in files}):
        raise BadModelName(f"a range names {foreign[0]!r}, which is not among the requested files")
    return [_span(file, ranges.get(file.path)) for file in files]


def _span(file: FileRecord, wanted: model_pb2.FileRange | None) -> Span:
    if wanted is None:
        return Span(file, 0, file.size)
    end = wanted.offset + wanted.length if wanted.length else file.size
    if wanted.offset > file.size or end > file.size:
        raise BadModelName(
            f"{file.path!r} has {file.size} bytes, but the range from {wanted.offset} to {end} was requested"
        )
    return Span(file, wanted.offset, end)


def messages(
    root: Path, record: ModelRecord, parts: list[Span], size: int, *, with_digests: bool = False
) -> Iterator[bytes]:
    """Serialised FileChunks, one in memory at a time. `with_digests`: each chunk carries the digest of its data.

    Reading ahead in another thread was tried: switching between threads cost more than it saved.

    Raises:
        FileDamaged: a file is missing or has another size than the record says.
    """
    commit = record.key.revision if is_commit(record.key.revision) else None
    for part in parts:
        handle = opened_file(root, part.file)
        try:
            for fields, offset, length in _chunks(part, size, commit, is_last_file=part is parts[-1]):
                yield chunk_message(fields.SerializeToString(), handle, offset, length, with_digest=with_digests)
        except FileTooShort as error:
            raise FileDamaged(f"{part.file.path} of {record.key} was truncated: {error}") from error
        finally:
            os.close(handle)
        commit = None


def _chunks(
    part: Span, size: int, commit: str | None, *, is_last_file: bool
) -> Iterator[tuple[model_pb2.FileChunk, int, int]]:
    """The fields of each chunk, and its offset and length in the file."""
    offset = part.begin
    first = True
    while first or offset < part.end:
        length = min(size, part.end - offset)
        is_last = offset + length == part.end
        fields = model_pb2.FileChunk(
            relative_path=part.file.path,
            offset=offset,
            total_size=part.file.size,
            is_last_chunk=is_last,
            is_last_file=is_last and is_last_file,
            commit_hash=commit if first else None,
            digest=part.file.digest if first else None,
        )
        yield fields, offset, length
        offset += length
        first = False


def opened_file(root: Path, file: FileRecord) -> int:
    """A handle of a cached file. Raises FileDamaged where it has another size than its record, or cannot be read."""
    try:
        handle = open_regular_below(root, root / file.place)
    except OSError as error:
        raise FileDamaged(f"{file.path} cannot be read: {error}; remove the model and download it again") from error
    if (found := os.fstat(handle).st_size) != file.size:
        os.close(handle)
        raise FileDamaged(
            f"{file.path} has {found} bytes, but {file.size} were downloaded; remove the model and download it again"
        )
    with suppress(OSError):  # advice only; some file systems take none
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_SEQUENTIAL)
    return handle

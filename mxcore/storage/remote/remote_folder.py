"""Checkpoints that lie elsewhere: their headers, tensors through a bounded ring, their digest, their small files.

What reads them is a `RemoteFolder`: an object store (`object_store`) or the server's model cache (`server_cache`).
Ranges go straight into memory that exists; nothing touches the disk.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from mxcore.errors import CheckpointError
from mxcore.memory import HostBuffer
from mxcore.safetensors import Header, parse_header
from mxcore.storage.checkpoint import (
    INDEX_SUFFIX,
    Checkpoint,
    Framework,
    assembled,
    digest_of_parts,
    file_part,
    group_digest,
    groups_of,
    index_part,
    known_by_versions,
    weight_map_of,
)
from mxcore.storage.load import stream
from mxcore.storage.plan import MemoryBudget, Progress, Row
from mxserver.wire import WeightFiles, weight_files

__all__ = [
    "BATCH_BYTES",
    "RemoteFile",
    "RemoteFolder",
    "RemoteRange",
    "is_small",
    "open_remote",
    "pull_small_files",
    "remote_digest",
    "stream_remote",
]

HEAD_BYTES = 64 * 1024  # holds most headers: one round trip instead of two
BATCH_BYTES = 256 * 1024 * 1024  # of one submission: long enough to hide a store's latency behind many ranges
GROUPS_AT_ONCE = 16  # of a digest, 16 MiB at most each: few round trips, bounded memory
SMALL_FILE_BYTES = 256 * 1024 * 1024  # the largest file that is no weights: tokenizers reach 30 MB
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack", "*.onnx", "*.tensors", "*.ckpt")


class RemoteFile(NamedTuple):
    """A file below a remote folder. `version` changes with its content (an ETag, a digest); "" where unknown."""

    path: str
    size_bytes: int
    version: str


class RemoteRange(NamedTuple):
    """`length` bytes of a file from `offset` on, and the address of the memory that they go to."""

    path: str
    offset: int
    length: int
    address: int


class RemoteFolder(Protocol):
    """Files that are read by ranges. Thread-safe. All calls raise MxError with the place, the file and the cause."""

    @property
    def name(self) -> str:
        """What messages call it: without credentials."""

    @property
    def files(self) -> Sequence[RemoteFile]:
        """All files below, sorted by path, as they were when it was opened."""

    def whole(self, path: str) -> bytes:
        """A small file."""

    def read_into(self, ranges: Sequence[RemoteRange]) -> None:
        """Returns when all bytes are there. After an error nothing arrives in that memory any more."""

    def check_unchanged(self) -> None:
        """Raises when a file is another one than when the folder was opened."""

    def close(self) -> None:
        """Idempotent."""


def is_small(path: str) -> bool:
    """Whether a file is one that the engine wants beside the weights: configuration, tokenizer, code."""
    name = path.rsplit("/", 1)[-1]
    return not any(fnmatch.fnmatch(name.lower(), pattern) for pattern in _WEIGHTS)


def open_remote(folder: RemoteFolder) -> Checkpoint:
    """Reads the headers of the checkpoint's safetensors files; its `files` are paths below `folder`.

    Raises CheckpointError where there are none or the index does not fit, a SafetensorsError for a broken header, and
    what the folder raises.
    """
    whole = cache(folder.whole)
    chosen, files = _chosen(folder, whole)
    index = chosen.index_file
    weight_map = weight_map_of(whole(index), f"{folder.name}/{index}") if index is not None else None
    return assembled([Path(file.path) for file in files], _headers(folder, files), weight_map, folder.name)


def _chosen(folder: RemoteFolder, whole: Callable[[str], bytes]) -> tuple[WeightFiles, list[RemoteFile]]:
    """What the engine would read of such a folder, and those of its files that hold the checkpoint: safetensors."""
    chosen = weight_files([file.path for file in folder.files], whole)
    if chosen.missing:
        raise CheckpointError(f"{folder.name}: {chosen.index_file} lists {chosen.missing[0]}, which is not there")
    if not chosen.files or not chosen.files[0].endswith(".safetensors"):
        raise CheckpointError(f"{folder.name}: no *.safetensors there: is it a model's folder?")
    there = {file.path: file for file in folder.files}
    return chosen, [there[name] for name in chosen.files]


def _headers(folder: RemoteFolder, files: Sequence[RemoteFile]) -> list[Header]:
    firsts = [min(file.size_bytes, HEAD_BYTES) for file in files]
    heads = _read(folder, [[(file.path, 0, first)] for file, first in zip(files, firsts, strict=True)])
    longer: dict[int, int] = {}
    for place, (file, head) in enumerate(zip(files, heads, strict=True)):
        wanted = 8 + int.from_bytes(head[:8], "little")
        if len(head) < wanted <= min(file.size_bytes, 100_000_008):  # anything else is for the parser to refuse
            longer[place] = wanted
    rest = _read(folder, [[(files[p].path, firsts[p], wanted - firsts[p])] for p, wanted in longer.items()])
    for place, more in zip(longer, rest, strict=True):
        heads[place] += more
    return [
        parse_header(head, file.size_bytes, file=f"{folder.name}/{file.path}")
        for file, head in zip(files, heads, strict=True)
    ]


def _read(folder: RemoteFolder, groups: Sequence[Sequence[tuple[str, int, int]]]) -> list[bytes]:
    """The bytes of groups of (path, offset, length), each group's put together; all in one submission."""
    total_bytes = sum(length for group in groups for _, _, length in group)
    if not total_bytes:
        return [b"" for _ in groups]
    with HostBuffer(total_bytes, huge_pages=False) as buffer:
        ranges, at = [], buffer.address
        for path, offset, length in (part for group in groups for part in group):
            if length:
                ranges.append(RemoteRange(path, offset, length, at))
            at += length
        folder.read_into(ranges)
        with memoryview(buffer) as view:
            made, begin = [], 0
            for group in groups:
                end = begin + sum(length for _, _, length in group)
                made.append(bytes(view[begin:end]))
                begin = end
        return made


def remote_digest(folder: RemoteFolder) -> str:
    """What `checkpoint_digest` gives for the same files in a local folder: workers of either kind meet.

    Reads the headers and 4096 bytes of each tensor, once a node while the listing stays. Raises as `open_remote`.
    """
    return known_by_versions(f"remote {folder.name}", folder.files, lambda: _sampled(folder))


def _sampled(folder: RemoteFolder) -> str:
    whole = cache(folder.whole)  # index and modules.json are looked at, and digested
    chosen, files = _chosen(folder, whole)
    weights = sorted([*files, *(file for file in folder.files if file.path in chosen.of_modules)])
    safetensors = [file for file in weights if file.path.endswith(".safetensors")]
    headers = dict(zip([file.path for file in safetensors], _headers(folder, safetensors), strict=True))
    groups = [(file.path, ranges) for file in weights for ranges in groups_of(headers.get(file.path), file.size_bytes)]
    digests: dict[str, list[str]] = {}
    for at in range(0, len(groups), GROUPS_AT_ONCE):
        part = groups[at : at + GROUPS_AT_ONCE]
        read = _read(folder, [[(path, *place) for place in ranges] for path, ranges in part])
        for (path, _), data in zip(part, read, strict=True):
            digests.setdefault(path, []).append(group_digest(data))
    parts = [file_part(file.path, file.size_bytes, digests[file.path]) for file in weights]
    settings = ([chosen.index_file] if chosen.index_file else []) + list(chosen.module_settings)
    return digest_of_parts("".join(index_part(whole(name)) for name in settings), parts)


def stream_remote(
    folder: RemoteFolder,
    checkpoint: Checkpoint,
    names: Collection[str] | None = None,
    *,
    framework: Framework = "torch",
    read: Callable[[Sequence[RemoteRange]], None] | None = None,
    batch_bytes: int = BATCH_BYTES,
    progress: Progress | None = None,
    memory: MemoryBudget | None = None,
    through: Callable[..., Iterator[tuple[str, Any]]] | None = None,
) -> Iterator[tuple[str, Any]]:
    """Yields (name, tensor) in file order, through two buffers of at most `batch_bytes`; see `stream`.

    `read` reads instead of the folder itself (`shared_reads`). `through(read_rows, names, batch_bytes=, progress=)`
    yields instead of `stream`, and verifies. At the end the folder is asked whether it is the same.
    """
    paths = [str(file) for file in checkpoint.files]
    into = read or folder.read_into

    def read_rows(rows: Sequence[Row]) -> None:
        into([RemoteRange(paths[row[0]], row[1], row[2], row[5]) for row in rows])

    if through is not None:
        yield from through(read_rows, names, batch_bytes=batch_bytes, progress=progress)
        folder.check_unchanged()
        return
    options: dict[str, Any] = {"framework": framework, "batch_bytes": batch_bytes, "memory": memory}
    yield from stream(checkpoint, names, progress=progress, read=read_rows, **options)
    folder.check_unchanged()


def pull_small_files(folder: RemoteFolder, to: Path) -> int:
    """Brings configuration, tokenizer and code into a local folder; returns how many files.

    A file has its name only once it is whole. Raises what the folder raises, DiskFull and OSError.
    """
    from mxserver.wire import left_out, path_problem, unique_beside
    from mxserver.wire.files import full_disk_is_told

    count = 0
    out = left_out([file.path for file in folder.files])
    for file in folder.files:
        if file.path in out or file.path.endswith(INDEX_SUFFIX):
            continue
        if not is_small(file.path) or file.size_bytes > SMALL_FILE_BYTES:
            continue
        if problem := path_problem(file.path):
            raise CheckpointError(f"{folder.name} has {file.path[:200]!r}, which is refused: {problem}")
        place = to / file.path
        beside = unique_beside(place)
        data = folder.whole(file.path)
        with full_disk_is_told(to, len(data)):
            place.parent.mkdir(parents=True, exist_ok=True)
            try:
                beside.write_bytes(data)
                beside.replace(place)
            finally:
                beside.unlink(missing_ok=True)
        count += 1
    return count

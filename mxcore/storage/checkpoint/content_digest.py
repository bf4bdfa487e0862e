"""What tells two checkpoints apart without reading all of them.

Two workers exchange weights only if their checkpoints are the same; reading hundreds of gigabytes to find out would
cost more than the transfer saves. So some bytes of every tensor are read.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from mxcore.digest import xxh3_64
from mxcore.errors import StorageError
from mxcore.memory import HostBuffer
from mxcore.reading import read_ranges
from mxcore.safetensors import Header, read_header
from mxcore.storage.checkpoint.known_digests import DIGEST_FORMAT, SampledFile, is_settled, known_or_made

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = [
    "BLOCKS_PER_FILE",
    "BLOCK_BYTES",
    "Range",
    "checkpoint_digest",
    "digest_of_parts",
    "file_part",
    "group_digest",
    "groups_of",
    "index_part",
]

BLOCK_BYTES = 4096
BLOCKS_PER_FILE = 64  # of a file without a header, whose tensors are not known
_GROUP_RANGES = 4096  # that are digested together: 16 MiB at most, however many tensors a file has
_AT_ONCE = 8  # groups, or headers
_THREADS_A_GROUP = 16  # small reads from what may be a network file system: it is latency that is shared
Range = tuple[int, int]  # offset and length, bytes of the file


def checkpoint_digest(
    weight_files: Sequence[Path],
    index_file: Path | None,
    *,
    folder: Path | None = None,
    settings_files: Sequence[Path] = (),
) -> str:
    """The digest of a checkpoint: 16 hex digits, or "" without weight files.

    It sees: the bytes of the index file and of `settings_files`; each weight file's name (its path below `folder`, if
    it is given) and size; of each `.safetensors` file the header, and of **every tensor** 4096 bytes at a place that
    depends on its name (all of it up to 4096 bytes); of each other file 64 evenly spaced blocks of 4096 bytes, the
    first and the last always among them. It does not depend on the folder, on the order of `weight_files`, on times or
    on links.

    It does not see a change of a few elements in place: a tensor that was replaced, trained, merged or requantised is
    seen, an element that was edited is not. It is XXH3-64: a guard against mix-ups, not against an attacker.

    At most 128 reads are under way, of eight groups of at most 16 MiB, and once a node while their size, inode and
    times stay (`known_digests`). Safe from any thread. Raises StorageError or TruncatedRead for a file that cannot be
    read, a subclass of SafetensorsError for a broken header, and ValueError if two files have one name.
    """
    if not weight_files:
        return ""
    named = sorted((_name(Path(file), folder), Path(file)) for file in weight_files)
    names = [name for name, _ in named]
    if len(set(names)) != len(names):
        raise ValueError(f"two weight files have the same name: {names}")
    others = [Path(file) for file in ([index_file] if index_file is not None else []) + list(settings_files)]
    weights = tuple(_as_it_is(name, path) for name, path in named)
    beside = tuple(_as_it_is(path.name, path) for path in others)
    return _digest(weights, beside) if is_settled(weights + beside) else _known(weights, beside)


@lru_cache(maxsize=32)
def _digest(weights: tuple[SampledFile, ...], others: tuple[SampledFile, ...]) -> str:
    return _known(weights, others)


def _known(weights: tuple[SampledFile, ...], others: tuple[SampledFile, ...]) -> str:
    return known_or_made(f"files {len(weights)}", weights + others, lambda: _made(weights, others))


def _made(weights: Sequence[SampledFile], others: Sequence[SampledFile]) -> str:
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        groups = list(pool.map(_groups, weights))
        each = [
            (file.path, ranges)
            for file, ranges_of_file in zip(weights, groups, strict=True)
            for ranges in ranges_of_file
        ]
        digests = iter(list(pool.map(_group, each)))
    parts = [
        file_part(file.name, file.size_bytes, [next(digests) for _ in of_file])
        for file, of_file in zip(weights, groups, strict=True)
    ]
    return digest_of_parts("".join(_index_part(file.path) for file in others), parts)


def digest_of_parts(index: str, files: Sequence[str]) -> str:
    """The digest, out of the `index_part`s ("" without any) and the `file_part`s sorted by name."""
    text = "\0".join([DIGEST_FORMAT, index, *files])  # no name has a NUL
    return f"{xxh3_64(text.encode('utf-8', 'surrogateescape')):016x}"


def index_part(data: bytes) -> str:
    """What an index file adds to the digest."""
    return f"{xxh3_64(data):016x}"


def group_digest(data: Buffer) -> str:
    """Of the bytes of one of `groups_of`, its ranges put together."""
    return f"{xxh3_64(data):016x}"


def file_part(name: str, size_bytes: int, groups: Iterable[str]) -> str:
    """What a weight file adds: `groups` are the `group_digest`s of its `groups_of`."""
    return ":".join([name, str(size_bytes), *groups])


def groups_of(header: Header | None, size_bytes: int) -> list[list[Range]]:
    """What is read of a file, `header` None for what is no safetensors file: groups of at most 4096 ranges."""
    if header is None:
        return [_even(size_bytes)]
    begin = header.data_offset
    ranges = [(begin + tensor.begin, tensor.size_bytes, tensor.name) for tensor in header.tensors]
    blocks = [_of_tensor(*place) for place in ranges if place[1]]
    return [[(0, begin)], *(blocks[at : at + _GROUP_RANGES] for at in range(0, len(blocks), _GROUP_RANGES))]


def _of_tensor(begin: int, size_bytes: int, name: str) -> Range:
    spare = size_bytes - BLOCK_BYTES
    if spare <= 0:
        return begin, size_bytes
    return begin + xxh3_64(name.encode("utf-8", "surrogatepass")) % (spare + 1), BLOCK_BYTES


def _even(size_bytes: int) -> list[Range]:
    if size_bytes <= BLOCK_BYTES * BLOCKS_PER_FILE:
        return [(0, size_bytes)]
    last = size_bytes - BLOCK_BYTES
    return [(last * block // (BLOCKS_PER_FILE - 1), BLOCK_BYTES) for block in range(BLOCKS_PER_FILE)]


def _name(path: Path, folder: Path | None) -> str:
    return path.relative_to(folder).as_posix() if folder is not None and path.is_relative_to(folder) else path.name


def _as_it_is(name: str, path: Path) -> SampledFile:
    try:
        return SampledFile.of(name, path)
    except OSError as error:
        raise StorageError(f"{path}: cannot be read: {error.strerror}", file=str(path)) from error


def _index_part(file: Path) -> str:
    try:
        return index_part(file.read_bytes())
    except OSError as error:
        raise StorageError(f"{file}: cannot be read: {error.strerror}", file=str(file)) from error


def _groups(file: SampledFile) -> list[list[Range]]:
    header = read_header(file.path) if file.path.name.endswith(".safetensors") else None
    return groups_of(header, file.size_bytes)


def _group(what: tuple[Path, Sequence[Range]]) -> str:
    """The digest of one group's bytes."""
    path, ranges = what
    total_bytes = sum(length for _, length in ranges)
    if not total_bytes:
        return group_digest(b"")
    with HostBuffer(total_bytes, huge_pages=False) as buffer:
        reads, at = [], buffer.address
        for offset, length in ranges:
            reads.append((0, offset, length, at))
            at += length
        read_ranges([path], reads, threads=_THREADS_A_GROUP)
        return group_digest(buffer)

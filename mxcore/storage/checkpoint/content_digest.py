"""What tells two checkpoints apart without reading all of them.

Two workers exchange weights only if their checkpoints are the same; reading hundreds of gigabytes to find out would
cost more than the transfer saves. So this looks at what differs between checkpoints in practice.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mxcore.digest import xxh3_64
from mxcore.errors import StorageError
from mxcore.memory import HostBuffer
from mxcore.reading import read_ranges
from mxcore.safetensors import read_header

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = [
    "BLOCKS_PER_FILE",
    "BLOCK_BYTES",
    "checkpoint_digest",
    "digest_of_parts",
    "file_part",
    "index_part",
    "sample",
]

BLOCK_BYTES = 4096
BLOCKS_PER_FILE = 16
_READER_THREADS = 8  # small reads from what may be a network file system: it is latency that is shared
_FORMAT = "checkpoint-digest-1"


def checkpoint_digest(weight_files: Sequence[Path], index_file: Path | None) -> str:
    """The digest of a checkpoint: 16 hex digits, or "" without weight files.

    It sees: the bytes of the index file; each weight file's name (without folder), size and, where the name ends in
    `.safetensors`, header; 16 evenly spaced blocks of 4096 bytes of each file's data, the first and the last always
    among them (all of the data up to 65,536 bytes). It does not depend on the folder, on the order of
    `weight_files`, on times or on links.

    It does not see a change of data that leaves all sizes and headers alone and lies between the blocks, such as a
    few elements edited in place: 16 blocks of a 5 GB shard are 1 in 76,000 bytes. A fine-tuned, requantised or merged
    checkpoint changes everywhere, and is seen. It is XXH3-64: a guard against mix-ups, not against an attacker.

    Safe from any thread; a few reads a file, files one after the other. Raises StorageError or TruncatedRead for a
    file that cannot be read, a subclass of SafetensorsError for a broken header, and ValueError if two files have one
    name.
    """
    if not weight_files:
        return ""
    paths = sorted((Path(file) for file in weight_files), key=lambda path: path.name)
    names = [path.name for path in paths]
    if len(set(names)) != len(names):
        raise ValueError(f"two weight files have the same name: {sorted(names)}")
    return digest_of_parts(_index_part(index_file), [_file_part(path) for path in paths])


def digest_of_parts(index: str, files: Sequence[str]) -> str:
    """The digest, out of an `index_part` ("" without an index) and the `file_part`s sorted by name."""
    text = "\0".join([_FORMAT, index, *files])  # no name has a NUL
    return f"{xxh3_64(text.encode('utf-8', 'surrogateescape')):016x}"


def index_part(data: bytes) -> str:
    """What an index file adds to the digest."""
    return f"{xxh3_64(data):016x}"


def file_part(name: str, size_bytes: int, data: Buffer) -> str:
    """What a weight file adds: `data` is its header, then the blocks of `sample`."""
    return f"{name}:{size_bytes}:{xxh3_64(data):016x}"


def _index_part(index_file: Path | None) -> str:
    if index_file is None:
        return ""
    try:
        return index_part(index_file.read_bytes())
    except OSError as error:
        raise StorageError(f"{index_file}: cannot be read: {error.strerror}", file=str(index_file)) from error


def _file_part(path: Path) -> str:
    try:
        size_bytes = path.stat().st_size
    except OSError as error:
        raise StorageError(f"{path}: cannot be read: {error.strerror}", file=str(path)) from error
    data_offset = read_header(path).data_offset if path.name.endswith(".safetensors") else 0
    ranges = [(0, data_offset), *sample(data_offset, size_bytes)]
    total_bytes = sum(length for _, length in ranges)
    if not total_bytes:
        return f"{path.name}:0:"
    with HostBuffer(total_bytes, huge_pages=False) as buffer:
        reads, at = [], buffer.address
        for offset, length in ranges:
            reads.append((0, offset, length, at))
            at += length
        read_ranges([path], reads, threads=_READER_THREADS)
        return file_part(path.name, size_bytes, buffer)


def sample(begin: int, end: int) -> list[tuple[int, int]]:
    """(offset, length) of the blocks of the data in [begin, end), in bytes of the file."""
    if end - begin <= BLOCK_BYTES * BLOCKS_PER_FILE:
        return [(begin, end - begin)]
    last = end - begin - BLOCK_BYTES
    return [(begin + last * block // (BLOCKS_PER_FILE - 1), BLOCK_BYTES) for block in range(BLOCKS_PER_FILE)]

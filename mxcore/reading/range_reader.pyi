"""Byte ranges of files straight into memory that exists, compiled; several threads, the GIL released."""

import os
from collections.abc import Iterable
from typing import final

from typing_extensions import Buffer

@final
class ReadRange:
    """`length` bytes at byte `offset` of a file, and where they go.

    `file` is a path, or an open descriptor that supports pread (it is neither moved nor closed). `destination` is the
    address of host memory, which the caller keeps alive and big enough, or a writable, C-contiguous buffer (HostBuffer,
    numpy, memoryview, bytearray) of at least `length` bytes, filled from its start.

    Raises ValueError for a range that no file can have.
    """

    def __init__(
        self, file: str | bytes | os.PathLike[str] | int, offset: int, length: int, destination: int | Buffer
    ) -> None: ...
    @property
    def file(self) -> str | bytes | os.PathLike[str] | int: ...
    @property
    def offset(self) -> int: ...
    @property
    def length(self) -> int: ...
    @property
    def destination(self) -> int | Buffer: ...

@final
class RangeReader:
    """Reads ranges with `threads` threads (1 to 64, the calling one included), started for each call.

    It holds no state but that number: any threads may read through one reader at once.
    """

    def __init__(self, threads: int = 4) -> None: ...
    @property
    def threads(self) -> int: ...
    def read(self, ranges: Iterable[ReadRange]) -> int:
        """Reads all ranges, in any order; returns the bytes read, which is the sum of the lengths.

        Each path is opened once a call and closed at its end. Reads go out in pieces of at most 8 MiB; ranges that
        follow each other in the list and in the file are read together. Ranges may overlap in the file, not in memory.

        Raises StorageError (cannot be opened or read; the error number is that of pread, EFAULT for an address that is
        no memory) and TruncatedRead (the file ends before a range does; where the size tells, before anything is
        read), both with file, offset, wanted and got; ValueError or BufferError for a destination that does not fit;
        KeyboardInterrupt. `got` is how far into the range the failure lies, not a promise that all before it was
        read. After an error no thread writes any more, and what the destinations hold is undefined.
        """

def live_file_descriptors() -> int:
    """Descriptors that readers have open now: 0 when no read is under way."""

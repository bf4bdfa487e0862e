"""The files of one read: descriptors, mappings, and whether they stay what they were, compiled.

Any thread may use it.
"""

import os
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Self, final

from mxcore.safetensors import FileStamp

@final
class FileSet:
    """Opens all files for reading, which have to be regular ones; raises StorageError for one that cannot be.

    `stamps` has for each file `Header.stamp`, or None: where a file's size or time is another one, it is not the file
    whose header was read, and this raises FileChanged, or TruncatedRead if it is shorter.
    """

    def __init__(self, paths: Iterable[str | os.PathLike[str]], stamps: Sequence[FileStamp | None] = ()) -> None: ...
    @property
    def paths(self) -> tuple[str, ...]: ...
    def __len__(self) -> int: ...
    def descriptor(self, index: int) -> int:
        """The open file's descriptor, which stays this object's. ValueError for a file that is not open."""

    def file_system(self, index: int) -> int:
        """The magic number of the file's file system (statfs(2)), 0 where that cannot be found out."""

    def map(self, index: int) -> None:
        """Maps the whole file for reading; nothing for an empty one. Raises StorageError if that cannot be had."""

    def open_direct(self, index: int) -> int:
        """Opens the file a second time with O_DIRECT; returns the alignment (bytes) of reads, 0 if it cannot."""

    def check_unchanged(self) -> None:
        """Raises TruncatedRead if a file is shorter than when it was opened, FileChanged if it was written to."""

    def close(self) -> None:
        """Closes and unmaps everything; idempotent.

        While other threads read from it, the last of them does: its descriptors are not given to other files before.
        Nothing new is begun meanwhile (ValueError).
        """

    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...

def live_file_descriptors() -> int:
    """Descriptors that all file sets hold now."""

def live_mappings() -> int:
    """Mappings that all file sets hold now."""

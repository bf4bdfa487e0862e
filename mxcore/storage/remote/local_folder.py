"""A folder of this machine, as a `RemoteFolder`: for what does the same with folders near and far."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mxcore.errors import StorageError
from mxcore.reading import read_ranges
from mxcore.storage.remote.remote_folder import RemoteFile, RemoteRange

__all__ = ["LocalFolder"]

_READER_THREADS = 8


class LocalFolder:
    """All files below a folder. Thread-safe. Raises StorageError and TruncatedRead."""

    def __init__(self, folder: Path) -> None:
        self.name = str(folder)
        self._folder = folder
        self.files = self._listed()
        if not self.files:
            raise StorageError(f"{folder}: no such folder, or an empty one", file=str(folder))

    def _listed(self) -> tuple[RemoteFile, ...]:
        found = []
        for path in self._folder.rglob("*"):
            if path.is_file():
                state = path.stat()
                version = str(state.st_mtime_ns)
                found.append(RemoteFile(path.relative_to(self._folder).as_posix(), state.st_size, version))
        return tuple(sorted(found))

    def whole(self, path: str) -> bytes:
        """A small file."""
        try:
            return (self._folder / path).read_bytes()
        except OSError as error:
            raise StorageError(f"{self._folder / path}: cannot be read: {error.strerror}", file=path) from error

    def read_into(self, ranges: Sequence[RemoteRange]) -> None:
        """All ranges, by the compiled reader."""
        places = {path: place for place, path in enumerate(dict.fromkeys(path for path, *_ in ranges))}
        read_ranges(
            [self._folder / path for path in places],
            [(places[path], offset, length, to) for path, offset, length, to in ranges],
            threads=_READER_THREADS,
        )

    def check_unchanged(self) -> None:
        """Raises StorageError when a file has changed its size or its time."""
        if self._listed() != self.files:
            raise StorageError(f"{self._folder} has changed since it was opened", file=self.name)

    def close(self) -> None:
        """Nothing is held open."""

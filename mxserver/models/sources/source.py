"""The interface of the providers that models come from."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Protocol, Self

from mxserver.models.names import ModelKey, ModelName


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file as its provider describes it; empty or None where the provider does not say."""

    path: str
    size: int | None
    sha256: str = ""
    git_sha1: str = ""
    etag: str = ""

    @property
    def blob(self) -> str:
        """The file's name in the hub's blobs/."""
        return self.sha256 or self.git_sha1


@dataclass(frozen=True, slots=True)
class RemoteModel:
    """One resolved revision of a model: its files do not change any more, or a change is noticed.

    `files` can be had. `listed` are the names that the provider lists, None where it could not be asked; `unavailable`
    says why what is listed and not among `files` cannot be had.
    """

    key: ModelKey
    files: tuple[RemoteFile, ...]
    listed: tuple[str, ...] | None
    unavailable: str = ""

    @classmethod
    def of(cls, key: ModelKey, files: Iterable[RemoteFile]) -> Self:
        """All that the provider lists."""
        found = tuple(files)
        return cls(key, found, tuple(file.path for file in found))


class ModelSource(Protocol):
    """One provider. Thread-safe.

    Both calls raise DownloadFailed, or DownloadInterrupted where trying again may help.
    """

    parallel_files: int

    def resolve(self, model: ModelName, revision: str) -> RemoteModel:
        """Resolves a revision as it is now. Raises RevisionNotFound too."""

    def fetch(self, remote: RemoteModel, file: RemoteFile, scratch: Path, stopping: Event) -> Path:
        """Downloads one file somewhere below `scratch`, and returns where it is, complete."""


def is_disk_full(error: BaseException | None) -> bool:
    """Whether an error, or one of its causes, says that no room is left."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        error = error.__cause__ or error.__context__
    return False


def write_all(handle: int, data: bytes | memoryview, offset: int) -> None:
    """pwrite until all of it is written. Raises OSError."""
    view = memoryview(data)
    while view:
        written = os.pwrite(handle, view, offset)
        view, offset = view[written:], offset + written

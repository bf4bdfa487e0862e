"""Models in a folder of the server's machine (`file:///…`), below one of the folders that the server allows.

The files are copied into the cache, which can guarantee whole files, digests and eviction only for its own folder.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from threading import Event

from mxserver.models.errors import DownloadFailed, DownloadInterrupted, RevisionNotFound
from mxserver.models.names import ModelKey, ModelName
from mxserver.models.sources.object_download import listing_revision
from mxserver.models.sources.source import RemoteFile, RemoteModel, is_disk_full
from mxserver.wire import open_regular_below

_COPY_BYTES = 64 * 1024 * 1024


class FolderSource:
    """Folders below `roots`; without roots, every name is refused. Links that lead out of a root are refused too."""

    parallel_files = 2

    def __init__(self, roots: tuple[Path, ...]) -> None:
        self._roots = tuple(Path(os.path.realpath(root)) for root in roots)

    def resolve(self, model: ModelName, revision: str) -> RemoteModel:
        folder, root = self._folder(model)
        if not folder.is_dir():
            raise RevisionNotFound(f"{model.name} is not a folder on the server")
        files = []
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                if not Path(os.path.realpath(path)).is_relative_to(root):
                    raise DownloadFailed(f"{model.name}: {path.name} is a link that leads out of {root}")
                found = path.stat()
                files.append(RemoteFile(str(path.relative_to(folder)), found.st_size, etag=str(found.st_mtime_ns)))
        if not files:
            raise RevisionNotFound(f"{model.name} has no files")
        return RemoteModel.of(ModelKey(model, listing_revision(files)), files)

    def fetch(self, remote: RemoteModel, file: RemoteFile, scratch: Path, stopping: Event) -> Path:
        folder, root = self._folder(remote.key.model)
        beside = scratch / hashlib.sha256(file.path.encode()).hexdigest()
        try:
            source = open_regular_below(root, folder / file.path)
            try:
                before = os.fstat(source)
                _copy(source, beside, stopping)
                after = os.fstat(source)
                # The time of the last write can be set back, the time of the last change cannot.
                if str(after.st_mtime_ns) != file.etag or after.st_ctime_ns != before.st_ctime_ns:
                    raise DownloadFailed(f"{folder / file.path} changed while it was copied; ask again")
            finally:
                os.close(source)
        except OSError as error:
            if is_disk_full(error):
                raise DownloadInterrupted(f"{file.path}: no space left on the disk") from error
            raise DownloadFailed(f"{folder / file.path} cannot be copied: {error.strerror or error}") from error
        return beside

    def _folder(self, model: ModelName) -> tuple[Path, Path]:
        folder = Path(os.path.realpath(model.name.removeprefix("file://")))
        root = next((root for root in self._roots if folder.is_relative_to(root)), None)
        if root is None:
            raise DownloadFailed(
                f"{model.name} is not below a folder that this server may copy from; name some in MX_FILE_SOURCES"
            )
        return folder, root


def _copy(source: int, beside: Path, stopping: Event) -> None:
    handle = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    try:
        while os.sendfile(handle, source, None, _COPY_BYTES):
            if stopping.is_set():
                raise DownloadFailed(f"{beside.name} was interrupted: the server is stopping")
    finally:
        os.close(handle)

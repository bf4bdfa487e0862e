"""The client of the server's model cache: downloads there, files from there. Needs neither torch nor an engine."""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple, TypeVar

import grpc

from mxserver.wire.calls import NO_ANSWER, Closing, Patience, ServerChannel, call_failure
from mxserver.wire.credentials import ClientCredentials
from mxserver.wire.errors import (
    DiskFull,
    FileRefused,
    ModelDownloadError,
    ModelNotFound,
    ServerRefused,
    ServerUnreachable,
    WireError,
)
from mxserver.wire.file_locks import host_id, locks_work
from mxserver.wire.files.disk_room import check_room, full_disk_is_told
from mxserver.wire.files.file_reader import FileReader
from mxserver.wire.files.file_source import PortState
from mxserver.wire.files.model_names import provider_of
from mxserver.wire.files.model_stream import FetchReport, FolderFetch
from mxserver.wire.files.partial_file import FileInfo, has_content, partial_path
from mxserver.wire.files.pieces import FilesPlace
from mxserver.wire.proto import cache_pb2, cache_pb2_grpc, model_pb2, model_pb2_grpc
from mxserver.wire.relative_path import path_problem
from mxserver.wire.unique_path import BEGIN, remove_leftovers, unique_beside

__all__ = ["FetchReport", "FileInfo", "FileReader", "ModelClient", "ModelFiles"]

T = TypeVar("T")

PARTIAL_FOLDER = ".mx-partial"


class ModelFiles(NamedTuple):
    """The files of a cached model, and the revision to ask for them with: the commit, where the server names it.

    `folder` is where the server itself has them, under their names; a worker that shares its storage can look there.
    """

    files: tuple[FileInfo, ...]
    revision: str | None
    folder: Path | None = None
    place: FilesPlace | None = None  # where they are by HTTP; None: the server tells of no port for files

    @property
    def size_bytes(self) -> int:
        return sum(info.size for info in self.files)


class ModelClient(Closing):
    """Calls about models to one server. Thread-safe. Create it after a fork, never before.

    A model is named as its provider does: `org/name` for the hub, or `s3://bucket/prefix`, `gs://…`, `az://…`,
    `file:///…`. Works against a server that knows only the protocol's original fields: files are then checked by
    their size alone, and a broken stream begins its file again.

    All calls raise ServerUnreachable when there is no answer, ModelNotFound when the server has no such thing, and
    ServerRefused when it says no for another reason.
    """

    def __init__(
        self,
        address: str,
        *,
        timeout_seconds: float = 30.0,
        patience_seconds: float = 60.0,
        credentials: ClientCredentials | None = None,
        files_port: int | None = None,
    ) -> None:
        """`address` is what `parse_server_address` returns. `timeout_seconds`: of short calls; `patience_seconds`:
        how long a download or a stream waits for a silent server. Without `credentials`, certificates and token are
        those of the environment. `files_port`: for files by HTTP, instead of the one that the server tells, where it
        has one; 0: all files come over gRPC.
        """
        self.address = address
        self._timeout_seconds = timeout_seconds
        self._patience_seconds = patience_seconds
        self._credentials = credentials
        self._server = ServerChannel(address, credentials)
        self._files_port = files_port
        self._port = PortState(address, is_closed=files_port == 0)

    @property
    def _models(self) -> model_pb2_grpc.ModelServiceStub:
        return model_pb2_grpc.ModelServiceStub(self._server.channel())

    @property
    def _cache(self) -> cache_pb2_grpc.CacheServiceStub:
        return cache_pb2_grpc.CacheServiceStub(self._server.channel())

    def close(self) -> None:
        """Idempotent."""
        self._server.close()

    def ensure(
        self,
        name: str,
        *,
        revision: str | None = None,
        ignore_weights: bool = False,
        pin: bool = False,
        on_update: Callable[[model_pb2.ModelStatusUpdate], None] | None = None,
        on_wait: Callable[[ServerUnreachable], None] | None = None,
    ) -> str | None:
        """Has the server download the model, unless it is there; returns the commit. Goes on after a restart of
        the server. `on_update` is called with every message of the server, `on_wait` with each error that is waited
        out.

        Raises:
            ModelDownloadError: the server could not get it.
        """
        request = model_pb2.ModelDownloadRequest(
            model_name=name, provider=provider_of(name), ignore_weights=ignore_weights, revision=revision, pin=pin
        )
        patience = Patience(self._patience_seconds)
        while True:
            last: model_pb2.ModelStatusUpdate | None = None
            try:
                for last in self._models.EnsureModelDownloaded(request):
                    patience.heard()
                    if on_update:
                        on_update(last)
            except grpc.RpcError as error:
                raised = self._as_error("EnsureModelDownloaded", error)
                if isinstance(raised, ServerUnreachable) and on_wait:
                    on_wait(raised)
                if not isinstance(raised, ServerUnreachable) or not patience.wait():
                    raise raised from error
                continue
            if last is None or last.status == model_pb2.DOWNLOADING:
                raise ServerUnreachable(f"{self.address} ended the download's stream before the download")
            if last.status == model_pb2.ERROR:
                raise ModelDownloadError(f"{self.address} could not download {name}: {last.message}")
            return last.resolved_revision if last.HasField("resolved_revision") else None

    def list_files(self, name: str, *, revision: str | None = None, ignore_weights: bool = False) -> ModelFiles:
        """The model's files in the server's cache. Starts no download.

        Raises:
            FileRefused: the server lists a name that cannot be a file below a folder.
        """
        request = model_pb2.ModelFilesRequest(
            model_name=name, provider=provider_of(name), ignore_weights=ignore_weights, revision=revision
        )
        listed = self._call(
            "ListModelFiles", lambda: self._models.ListModelFiles(request, timeout=self._timeout_seconds)
        )
        for info in listed.files:
            if problem := path_problem(info.relative_path):
                raise FileRefused(f"{self.address} lists {info.relative_path[:200]!r} for {name}: {problem}")
        files = tuple(FileInfo(info.relative_path, info.size, info.digest) for info in listed.files)
        # A server with the protocol's original fields alone names no commit: then streams use the same name.
        commit = listed.resolved_revision if listed.HasField("resolved_revision") else revision
        port = self._files_port if self._files_port is not None and listed.files_port else listed.files_port
        place = FilesPlace(port, listed.files_path) if 0 < port < 65536 else None
        return ModelFiles(files, commit, Path(listed.folder) if listed.folder else None, place)

    def reader(self, name: str, *, revision: str | None = None, place: FilesPlace | None = None) -> FileReader:
        """Parts of the model's files, straight into memory; its `close` must be called. Give the revision and
        the place that `list_files` returned: so all parts are of the same files, and come by HTTP where they can.
        """
        request = model_pb2.ModelFilesRequest(model_name=name, provider=provider_of(name), revision=revision)
        return FileReader(
            self.address,
            self._credentials,
            request,
            place,
            self._port,
            patience_seconds=self._patience_seconds,
            as_error=self._as_error,
        )

    def fetch(
        self,
        name: str,
        folder: Path,
        *,
        revision: str | None = None,
        ignore_weights: bool = False,
        streams: int = 4,
        chunk_bytes: int = 0,
        on_bytes: Callable[[int], None] = lambda _: None,
    ) -> FetchReport:
        """Brings the model's files into a folder; files that are there with the right bytes stay.

        A file gets its name once it is complete, checked and on the disk. Incomplete files lie in `.mx-partial` for
        the next attempt of this host. One process at a time fetches into a folder; the next one waits. Where locks
        do not hold, or not between hosts, each fetches by itself.

        Raises:
            FileRefused: a name leads out of the folder, or bytes are wrong after three attempts.
            DiskFull: there is no room, before the first byte or later; all that this fetch brought is removed.
            OSError: the folder cannot be written.
        """
        listed = self.list_files(name, revision=revision, ignore_weights=ignore_weights)
        folder.mkdir(parents=True, exist_ok=True)
        with full_disk_is_told(folder, listed.size_bytes), _locked(folder / PARTIAL_FOLDER) as beside:
            return self._fetch(name, listed, folder, beside, streams, chunk_bytes, on_bytes)

    def fetch_to_hub_cache(
        self,
        name: str,
        cache: Path,
        *,
        revision: str | None = None,
        ref: str | None = None,
        ignore_weights: bool = False,
        streams: int = 4,
        on_bytes: Callable[[int], None] = lambda _: None,
    ) -> Path:
        """Brings a model of the hub into a folder in the hub's cache layout, and returns its snapshot's folder.

        HF_HUB_OFFLINE=1 finds it there, under its commit and under `ref`, which is `revision` unless given. Who asks
        more than once gives the commit that the first answer named as `revision`, and the branch as `ref`: a branch
        may move between two requests. A snapshot appears only once it is complete.

        Raises:
            FileRefused, DiskFull, OSError: as `fetch`.
            ServerRefused: the server names no commit.
        """
        listed = self.list_files(name, revision=revision, ignore_weights=ignore_weights)
        commit = listed.revision or ""
        if len(commit) != 40 or not set(commit) <= set("0123456789abcdef"):
            raise ServerRefused(f"{self.address} names no commit of {name}, but {commit[:100]!r}")
        named = ref or revision or "main"
        if ("/" in name and path_problem(name)) or path_problem(named):
            raise ServerRefused(f"{name}@{named} is not a name of the hub")
        repository = cache / f"models--{name.replace('/', '--')}"
        snapshot = repository / "snapshots" / commit
        with full_disk_is_told(cache, listed.size_bytes), _locked(repository / PARTIAL_FOLDER) as beside:
            whole = snapshot if snapshot.exists() else beside / commit
            whole.mkdir(parents=True, exist_ok=True)
            self._fetch(name, listed, whole, beside, streams, 0, on_bytes)
            if whole != snapshot:
                snapshot.parent.mkdir(exist_ok=True)
                try:
                    whole.rename(snapshot)
                except OSError:
                    if not snapshot.is_dir():
                        raise
                    shutil.rmtree(whole, ignore_errors=True)  # another process was first, where locks do not hold
            place = repository / "refs" / named
            if named != commit:
                place.parent.mkdir(parents=True, exist_ok=True)
                made = unique_beside(beside / "ref")
                made.write_text(commit)
                made.replace(place)
        return snapshot

    def _fetch(
        self,
        name: str,
        listed: ModelFiles,
        folder: Path,
        beside: Path,
        streams: int,
        chunk_bytes: int,
        on_bytes: Callable[[int], None],
    ) -> FetchReport:
        started = time.monotonic()
        missing = [info for info in listed.files if not has_content(folder / info.path, info)]
        request = model_pb2.ModelFilesRequest(
            model_name=name, provider=provider_of(name), chunk_size=chunk_bytes, revision=listed.revision
        )
        fetch = FolderFetch(
            self.address,
            self._credentials,
            request,
            folder,
            beside,
            listed.place,
            self._port,
            streams=streams,
            patience_seconds=self._patience_seconds,
            on_bytes=on_bytes,
            as_error=self._as_error,
        )
        fetch.report.files_kept = len(listed.files) - len(missing)
        on_bytes(listed.size_bytes - sum(info.size for info in missing))
        try:
            _run(fetch, missing, folder, beside)
        except DiskFull:
            _remove(missing, folder, beside)
            raise
        fetch.report.seconds = time.monotonic() - started
        return fetch.report

    def delete(self, name: str, *, revision: str | None = None, force: bool = False) -> str:
        """Removes a model from the server's cache; without a revision, all of them. Returns what the server says.

        Raises:
            ModelNotFound: it is not there.
            ServerRefused: it is in use, or pinned (and not `force`).
        """
        request = model_pb2.DeleteModelRequest(
            model_name=name, provider=provider_of(name), revision=revision, force=force
        )
        response = self._call("DeleteModel", lambda: self._models.DeleteModel(request, timeout=self._timeout_seconds))
        if response.not_cached or not response.success:
            kind = ModelNotFound if response.not_cached else ServerRefused
            raise kind(f"DeleteModel at {self.address} was refused: {response.message}")
        return response.message

    def cached_models(self) -> cache_pb2.ListModelsResponse:
        """All models of the server's cache, and its limits."""
        request = cache_pb2.ListModelsRequest()
        return self._call("ListModels", lambda: self._cache.ListModels(request, timeout=self._timeout_seconds))

    def pin(self, name: str, *, revision: str | None = None, pinned: bool = True) -> str:
        """Keeps a cached model from being evicted, or lets it be again. Returns its revision."""
        request = cache_pb2.PinModelRequest(
            model_name=name, provider=provider_of(name), revision=revision, unpin=not pinned
        )
        return self._call("PinModel", lambda: self._cache.PinModel(request, timeout=self._timeout_seconds)).revision

    def validate(self, name: str, *, revision: str | None = None) -> Iterator[cache_pb2.FileVerdict]:
        """Has the server read all files of a cached model and compare them with what was downloaded."""
        request = cache_pb2.ValidateModelRequest(model_name=name, provider=provider_of(name), revision=revision)
        try:
            yield from self._cache.ValidateModel(request)
        except grpc.RpcError as error:
            raise self._as_error("ValidateModel", error) from error

    def _call(self, name: str, call: Callable[[], T]) -> T:
        try:
            return call()
        except grpc.RpcError as error:
            raise self._as_error(name, error) from error
        except ValueError as error:  # what grpcio raises for a call on a closed channel
            raise ServerUnreachable(f"{name} at {self.address}: {error}") from error

    def _as_error(self, name: str, error: grpc.RpcError) -> WireError:
        status, text = call_failure(name, self.address, error)
        if status in NO_ANSWER:
            return ServerUnreachable(text)
        if status is grpc.StatusCode.NOT_FOUND:
            return ModelNotFound(text)
        return ServerRefused(text)


def _run(fetch: FolderFetch, missing: list[FileInfo], folder: Path, beside: Path) -> None:
    """Raises DiskFull before the first byte if there is no room, so that nothing is fetched in vain."""
    partials = [partial_path(info, beside) for info in missing]
    here_bytes = sum(path.stat().st_size for path in partials if path.exists())
    wanted_bytes = sum(info.size for info in missing) - here_bytes
    check_room(folder, wanted_bytes)
    with full_disk_is_told(folder, wanted_bytes):
        fetch.run(missing)


def _remove(missing: list[FileInfo], folder: Path, beside: Path) -> None:
    """Removes what a failed fetch brought: others need the room, and an incomplete checkpoint is useless."""
    for info in missing:
        (folder / info.path).unlink(missing_ok=True)
        partial_path(info, beside).unlink(missing_ok=True)


@contextmanager
def _locked(folder: Path) -> Iterator[Path]:
    """Where incomplete files lie: in this host's folder in `folder`, for one process at a time, by a lock that ends
    with the process. Where locks do not hold, in a folder of this process alone, which goes at the end: others bring
    the same files beside it, as other hosts do, whose locks nobody may see here.
    """
    folder.mkdir(parents=True, exist_ok=True)
    own = folder / f"{BEGIN}{host_id()}"
    with suppress(OSError):
        os.utime(own)  # what other hosts left goes after a day, and not what this one goes on with
    remove_leftovers(folder)
    if not locks_work(folder):
        own = unique_beside(folder / "own")
        own.mkdir()
        try:
            yield own
        finally:
            shutil.rmtree(own, ignore_errors=True)
        return
    own.mkdir(exist_ok=True)
    handle = os.open(own / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield own
    finally:
        os.close(handle)

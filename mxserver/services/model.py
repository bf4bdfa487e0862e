"""ModelService: model files in the server's cache. Thin over mxserver.models.

Long streams run in their own thread pools, apart from the calls with which workers find each other.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import quote

import grpc

from mxserver.calls import PATIENCE_SECONDS, CallPool, Receiving, Statuses, in_pool, refuse_for, refuses
from mxserver.models import (
    DownloadJob,
    FileDamaged,
    JobState,
    ModelKey,
    ModelName,
    ModelRecord,
    OpenCache,
    Stopped,
    checked_revision,
    chunk_bytes,
    errors,
    is_commit,
    messages,
    model_name,
    selected_files,
    spans,
)
from mxserver.security import AccessError, Role, require_role
from mxserver.wire.files import FILES_FOLDER
from mxserver.wire.proto import model_pb2

_LOG = logging.getLogger(__name__)

SERVICE = "model_express.model.ModelService"

MAX_WAITING_CALLERS = 1024
MAX_STREAMS = 64

_UPDATE_SECONDS = 1.0  # a caller gets the download's progress at least this often, and at most four times as often
_MIN_UPDATE_SECONDS = 0.25
_READERS_SECONDS = 2.0  # a delete waits so long for those who read, all its revisions together

_STATUSES: Statuses = {
    errors.BadModelName: grpc.StatusCode.INVALID_ARGUMENT,
    errors.UnsafePath: grpc.StatusCode.INVALID_ARGUMENT,
    errors.ModelNotCached: grpc.StatusCode.NOT_FOUND,
    errors.RevisionNotFound: grpc.StatusCode.NOT_FOUND,
    errors.ModelInUse: grpc.StatusCode.FAILED_PRECONDITION,
    errors.CacheUnusable: grpc.StatusCode.FAILED_PRECONDITION,
    errors.SourceNotAllowed: grpc.StatusCode.PERMISSION_DENIED,
    errors.DownloadsFull: grpc.StatusCode.RESOURCE_EXHAUSTED,
    FileDamaged: grpc.StatusCode.DATA_LOSS,
    AccessError: grpc.StatusCode.PERMISSION_DENIED,
    errors.ModelError: grpc.StatusCode.UNAVAILABLE,
}

refuses_for_models = refuses(_STATUSES, lambda error: errors.CacheUnusable(f"the cache folder cannot be used: {error}"))
"""For methods that use the model cache."""


class ModelService:
    """Thread-safe. `add_to` a server; `close` after it has stopped."""

    def __init__(self, opened: OpenCache) -> None:
        self._opened = opened
        self.files_port = 0  # where the files are by HTTP; 0: nowhere
        self._waiting = CallPool(MAX_WAITING_CALLERS, "ensure", Receiving(1, PATIENCE_SECONDS))
        self._streaming = CallPool(MAX_STREAMS, "stream", Receiving(1, PATIENCE_SECONDS))

    def add_to(self, server: grpc.Server) -> None:
        handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            "EnsureModelDownloaded": grpc.unary_stream_rpc_method_handler(
                in_pool(self.ensure_model_downloaded, self._waiting),
                request_deserializer=model_pb2.ModelDownloadRequest.FromString,
                response_serializer=model_pb2.ModelStatusUpdate.SerializeToString,
            ),
            "StreamModelFiles": grpc.unary_stream_rpc_method_handler(
                in_pool(self.stream_model_files, self._streaming),  # yields messages that are serialised already
                request_deserializer=model_pb2.ModelFilesRequest.FromString,
            ),
            "ListModelFiles": grpc.unary_unary_rpc_method_handler(
                self.list_model_files,
                request_deserializer=model_pb2.ModelFilesRequest.FromString,
                response_serializer=model_pb2.ModelFileList.SerializeToString,
            ),
            "DeleteModel": grpc.unary_unary_rpc_method_handler(
                self.delete_model,
                request_deserializer=model_pb2.DeleteModelRequest.FromString,
                response_serializer=model_pb2.DeleteModelResponse.SerializeToString,
            ),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))

    def pools(self) -> dict[str, CallPool]:
        """The threads of its streams, by name."""
        return {"ensure": self._waiting, "stream": self._streaming}

    def close(self) -> None:
        """Releases the threads. Idempotent."""
        self._waiting.shutdown(wait=False)
        self._streaming.shutdown(wait=False)

    @refuses_for_models
    def ensure_model_downloaded(
        self, request: model_pb2.ModelDownloadRequest, context: grpc.ServicerContext
    ) -> Iterator[model_pb2.ModelStatusUpdate]:
        model = model_name(request.provider, request.model_name)
        revision = checked_revision(model, request.revision)
        if request.pin:
            require_role(Role.ADMIN, "a pin")
        downloads = self._opened.downloads
        job = downloads.ensure(model, revision, ignore_weights=request.ignore_weights)
        try:
            yield from self._follow(job, context)
        finally:
            downloads.leave(job)
        state = job.state()
        if isinstance(state.error, (errors.RevisionNotFound, errors.BadModelName, Stopped)):
            refuse_for("ensure_model_downloaded", context, state.error, _STATUSES)
        if state.phase == "done" and request.pin:
            self._opened.cache.set_pin(ModelKey(model, state.revision), pinned=True)
        if state.ended:
            yield _update(job, state)

    def _follow(self, job: DownloadJob, context: grpc.ServicerContext) -> Iterator[model_pb2.ModelStatusUpdate]:
        """Yields the download's progress until it ends or the caller leaves; between two of these it sleeps."""

        def gone() -> bool:
            return not context.is_active()

        state = job.state()
        if not state.ended and not context.add_callback(functools.partial(_note_end_of_call, job)):
            return
        while not state.ended and not gone():
            yield _update(job, state)
            state = _next_state(job, state.version, gone)

    @refuses_for_models
    def list_model_files(
        self, request: model_pb2.ModelFilesRequest, context: grpc.ServicerContext
    ) -> model_pb2.ModelFileList:
        model, revision = _named(request)
        record = self._opened.cache.find(model, revision)
        files = selected_files(record, request)
        self._opened.cache.touch(record.key)
        return model_pb2.ModelFileList(
            model_name=request.model_name,
            files=[
                model_pb2.ModelFileInfo(relative_path=file.path, size=file.size, digest=file.digest) for file in files
            ],
            total_size=sum(file.size for file in files),
            resolved_revision=_public_revision(record),
            folder=str(self._opened.cache.layout.snapshot(record.key)),
            files_port=self.files_port,
            files_path=_files_path(record) if self.files_port else "",
        )

    @refuses_for_models
    def stream_model_files(
        self, request: model_pb2.ModelFilesRequest, context: grpc.ServicerContext
    ) -> Iterator[bytes]:
        model, revision = _named(request)
        cache = self._opened.cache
        with cache.reading(model, revision) as record:
            parts = spans(selected_files(record, request), request)
            size = chunk_bytes(request.chunk_size)
            yield from messages(cache.layout.root, record, parts, size, with_digests=request.chunk_digests)

    @refuses_for_models
    def delete_model(
        self, request: model_pb2.DeleteModelRequest, context: grpc.ServicerContext
    ) -> model_pb2.DeleteModelResponse:
        model = model_name(request.provider, request.model_name)
        revision = checked_revision(model, request.revision) if request.revision else ""
        keys = self._keys(model, revision)
        if not keys:
            # It is as the caller wants it: existing clients take anything but success for a failure.
            return model_pb2.DeleteModelResponse(success=True, message=f"{model.name} is not cached", not_cached=True)
        removed, problems = 0, []
        until = time.monotonic() + _READERS_SECONDS
        for key in keys:
            patience = until - time.monotonic()
            try:
                removed += self._opened.cache.remove(key, force=request.force, patience_seconds=patience)
            except errors.ModelError as error:
                problems.append(str(error))
            except OSError as error:
                problems.append(f"{key} cannot be removed: {error}")
        if problems:
            return model_pb2.DeleteModelResponse(success=False, message="; ".join(problems))
        return model_pb2.DeleteModelResponse(success=True, message=f"removed {removed} bytes")

    def _keys(self, model: ModelName, revision: str) -> list[ModelKey]:
        cache = self._opened.cache
        if not revision:
            return [record.key for record in cache.records() if record.key.model == model]
        commit = revision if is_commit(revision) else cache.layout.read_ref(model, revision)
        key = ModelKey(model, commit) if commit else None
        return [key] if key and cache.record(key) else []


def _next_state(job: DownloadJob, told: int, gone: Callable[[], bool]) -> JobState:
    """The state once it is another one than was told, or after a while; soon after the caller is gone."""
    told_at = time.monotonic()
    state = job.wait_until(lambda now: now.version != told or gone(), _UPDATE_SECONDS)
    rest = told_at + _MIN_UPDATE_SECONDS - time.monotonic()
    return job.wait_until(lambda now: now.ended or gone(), rest) if rest > 0 else state


def _note_end_of_call(job: DownloadJob) -> None:
    if not job.state().ended:
        _LOG.info("a caller left model=%s; the download goes on", job.model)
    job.wake()


def _named(request: model_pb2.ModelFilesRequest) -> tuple[ModelName, str]:
    model = model_name(request.provider, request.model_name)
    return model, checked_revision(model, request.revision)


def _public_revision(record: ModelRecord) -> str | None:
    """The commit. None for a prefix of an object store, which has no revision that a client could ask for."""
    return record.key.revision if record.key.model.provider == model_pb2.HUGGING_FACE else None


def _files_path(record: ModelRecord) -> str:
    """The folder of a model's files on the port for files (mxserver.files_port)."""
    model = record.key.model
    parts = (model_pb2.ModelProvider.Name(model.provider), model.name, _public_revision(record) or "")
    return FILES_FOLDER + "".join(f"{quote(part, safe='')}/" for part in parts)


def _update(job: DownloadJob, state: JobState) -> model_pb2.ModelStatusUpdate:
    status = {"done": model_pb2.DOWNLOADED, "failed": model_pb2.ERROR}.get(state.phase, model_pb2.DOWNLOADING)
    progress = state.progress
    update = model_pb2.ModelStatusUpdate(
        model_name=job.model.name,
        status=status,
        message=state.message,
        provider=job.model.provider,
        progress=model_pb2.DownloadProgress(
            bytes_done=progress.bytes_done,
            bytes_total=progress.bytes_total,
            files_done=progress.files_done,
            files_total=progress.files_total,
            bytes_fetched=progress.bytes_fetched,
        ),
    )
    if state.revision and job.model.provider == model_pb2.HUGGING_FACE:
        update.resolved_revision = state.revision
    return update

"""CacheService: what the model cache holds, for people and scripts (`mx models list`, `pin`, `validate`)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import grpc

from mxserver.models import FileRecord, OpenCache, checked_revision, digest_fd, missing_of, model_name
from mxserver.services.model import refuses_for_models
from mxserver.wire import open_regular_below
from mxserver.wire.proto import cache_pb2, cache_pb2_grpc

SERVICE = "model_express.mx.CacheService"


class _CallerLeft(Exception):
    pass


class CacheService(cache_pb2_grpc.CacheServiceServicer):
    """Thread-safe."""

    def __init__(self, opened: OpenCache) -> None:
        self._opened = opened

    @refuses_for_models
    def ListModels(  # noqa: N802
        self, request: cache_pb2.ListModelsRequest, context: grpc.ServicerContext
    ) -> cache_pb2.ListModelsResponse:
        cache = self._opened.cache
        room = cache.room()
        return cache_pb2.ListModelsResponse(
            models=[
                cache_pb2.CachedModel(
                    model_name=record.key.model.name,
                    provider=record.key.model.provider,
                    revision=record.key.revision,
                    size_bytes=record.size_bytes,
                    file_count=len(record.files),
                    has_weights=record.has_weights,
                    pinned=cache.is_pinned(record.key),
                    in_use=cache.leases.is_used(record.key.id),
                    last_used_ms=round(cache.last_used(record.key) * 1000),
                )
                for record in sorted(cache.records(), key=lambda record: record.key)
            ],
            used_bytes=room.used_bytes,
            max_bytes=cache.limits.max_bytes,
            free_bytes=room.free_bytes,
            min_free_bytes=cache.limits.min_free_bytes,
        )

    @refuses_for_models
    def PinModel(  # noqa: N802
        self, request: cache_pb2.PinModelRequest, context: grpc.ServicerContext
    ) -> cache_pb2.PinModelResponse:
        model = model_name(request.provider, request.model_name)
        record = self._opened.cache.find(model, checked_revision(model, request.revision))
        self._opened.cache.set_pin(record.key, pinned=not request.unpin)
        return cache_pb2.PinModelResponse(revision=record.key.revision)

    @refuses_for_models
    def ValidateModel(  # noqa: N802
        self, request: cache_pb2.ValidateModelRequest, context: grpc.ServicerContext
    ) -> Iterator[cache_pb2.FileVerdict]:
        model = model_name(request.provider, request.model_name)
        cache = self._opened.cache
        try:
            with cache.reading(model, checked_revision(model, request.revision)) as record:
                missing = missing_of(record, cache.layout.root)
                absent = [*missing.weights, *missing.others]
                files_total = len(record.files) + len(absent)
                for number, file in enumerate(record.files, 1):
                    yield cache_pb2.FileVerdict(
                        relative_path=file.path,
                        size=file.size,
                        problem=_problem(cache.layout.root, file, context),
                        files_done=number,
                        files_total=files_total,
                    )
                for number, name in enumerate(absent, len(record.files) + 1):
                    yield cache_pb2.FileVerdict(
                        relative_path=name,
                        problem="is listed, and not in the cache: mx models get brings it",
                        files_done=number,
                        files_total=files_total,
                    )
        except _CallerLeft:
            return


def _problem(root: Path, file: FileRecord, context: grpc.ServicerContext) -> str:
    """What is wrong with a file; empty when its bytes are those that were downloaded."""

    def check(_: int) -> None:
        if not context.is_active():
            raise _CallerLeft

    try:
        handle = open_regular_below(root, root / file.place)
        try:
            size, digest = digest_fd(handle, progress=check)
        finally:
            os.close(handle)
    except OSError as error:
        return f"cannot be read: {error}"
    if size != file.size:
        return f"has {size} bytes, but {file.size} were downloaded"
    return "" if digest == file.digest else f"has the digest {digest}, but {file.digest} was downloaded"

"""The rung `cache`: the server's model cache, in a folder that both see or over gRPC."""

from __future__ import annotations

import logging
import threading
from functools import partial
from pathlib import Path

from mxcore.engine.context import LoadContext
from mxcore.engine.loaded import Loaded, Stored, load_stored
from mxcore.engine.model_files import find_checkpoint, model_name
from mxcore.engine.protocol import Files
from mxcore.engine.rungs.remote import streamed
from mxcore.errors import CheckpointError
from mxcore.load_ladder import PollResult, Rung, skip, take
from mxcore.storage.plan import Progress
from mxcore.storage.remote import ServerFolder, has_weights, hub_cache, remote_digest, same_files_here
from mxserver.wire import DiskFull, ModelNotFound
from mxserver.wire.files import ModelClient, ModelFiles
from mxserver.wire.proto import load_pb2

__all__ = ["CacheRung"]

_log = logging.getLogger("vllm.modelexpress")


class CacheRung(Rung[Loaded]):
    """Weights out of the server's cache; with MODEL_EXPRESS_NO_SHARED_STORAGE=1 over gRPC."""

    name = "cache"

    def __init__(self, context: LoadContext) -> None:
        self._context = context
        self._client: ModelClient | None = None
        self._listed: ModelFiles | None = None
        self._shared: Path | None = None
        self._asked: str | None = None  # the revision that the rung began with

    @property
    def _model(self) -> str:
        return model_name(self._context.engine.model)

    @property
    def _revision(self) -> str | None:
        engine = self._context.engine
        found = find_checkpoint(engine.model, engine.revision, engine.download_dir)
        return found.commit or engine.revision or self._context.settings.model_revision or None

    def poll(self) -> PollResult:
        """Taken when the cache has the model, or, without shared storage, when it is to get it."""
        settings = self._context.settings
        over_grpc = settings.no_shared_storage
        if settings.server_address is None:
            return skip("no server is set")
        if Path(self._model).is_absolute():
            return skip(f"{self._model} is a folder of this machine, and no model that the server could have")
        self._asked = self._revision
        try:
            self._listed = self._opened().list_files(self._model, revision=self._asked)
        except ModelNotFound:
            self._listed = None
        if self._listed is None or not has_weights(self._listed):
            self._listed = None
            if not over_grpc:
                return skip(f"the server's cache does not have the weights of {self._model}")
            return take(f"MODEL_EXPRESS_NO_SHARED_STORAGE=1: the server gets {self._model} and streams it")
        if over_grpc:
            bytes_text = f"{len(self._listed.files)} files, {self._listed.size_bytes} bytes"
            return take(f"MODEL_EXPRESS_NO_SHARED_STORAGE=1: {bytes_text} over gRPC from {settings.server_address}")
        self._shared, reason = same_files_here(self._listed)
        if self._shared is None:
            return skip(f"{reason} (MODEL_EXPRESS_NO_SHARED_STORAGE=1 takes the files over gRPC)")
        return take(reason)

    def _opened(self) -> ModelClient:
        if self._client is None:
            self._client = ModelClient(self._context.settings.server_address or "")
            self._context.at_end.callback(self._client.close)
        return self._client

    def load(self) -> Loaded:
        """A model with the cache's weights; raises MxError, OSError, and what building a model raises."""
        path = load_pb2.LOAD_PATH_SERVER if self._shared is None else load_pb2.LOAD_PATH_STORAGE
        return load_stored(self._context, "cache", path, self._stored, reading_alone=False)

    def _stored(self, progress: Progress) -> Stored:
        client = self._opened()
        if self._listed is None:
            commit = client.ensure(self._model, revision=self._asked) or self._asked
            self._listed = client.list_files(self._model, revision=commit)  # a branch may have moved meanwhile
        folder = self._shared
        if folder is None and self._context.settings.cache_weights:
            folder = self._fetched(client, self._listed, progress)
        if folder is None:  # MX_CACHE_WEIGHTS=0: nothing touches the disk
            remote = ServerFolder(client, self._model, self._listed)
            self._context.at_end.callback(remote.close)
            digest = remote_digest(remote)
            return Stored(streamed(self._context, remote), lambda: digest)
        return Stored(Files(folder), partial(_digest_of, folder))

    def _fetched(self, client: ModelClient, listed: ModelFiles, progress: Progress) -> Path | None:
        """The snapshot in the hub's cache, or None where that has no room or cannot be written: weights need no disk.

        Ranks of a node fetch one after the other: all but the first find it.
        """
        done_bytes, lock = [0], threading.Lock()

        def on_bytes(count: int) -> None:
            with lock:
                done_bytes[0] += count
            progress(done_bytes[0], listed.size_bytes)

        cache = hub_cache(self._context.engine.download_dir)
        try:
            return client.fetch_to_hub_cache(
                self._model, cache, revision=listed.revision, ref=self._asked or "main", on_bytes=on_bytes
            )
        except (DiskFull, OSError) as error:
            _log.warning("the weights go straight into the model, as with MX_CACHE_WEIGHTS=0: %s", error)
            self._context.fallbacks.append(f"{self.name}, past the disk: {error}")
            return None


def _digest_of(folder: Path) -> str:
    found = find_checkpoint(str(folder))
    if not found.weight_files:
        raise CheckpointError(f"{folder}: no complete checkpoint there")
    return found.digest()

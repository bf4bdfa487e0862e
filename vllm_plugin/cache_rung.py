"""The rung `cache`: the server's model cache, in a folder that both see or over gRPC."""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from mxcore.errors import CheckpointError
from mxcore.load_ladder import PollResult, skip, take
from mxcore.storage.checkpoint.content_digest import checkpoint_digest
from mxcore.storage.plan.progress import Progress
from mxcore.storage.remote.hub_folder import hub_cache
from mxcore.storage.remote.remote_folder import BATCH_BYTES, open_remote, remote_digest, stream_remote
from mxcore.storage.remote.server_cache import ServerFolder, has_weights, same_files_here
from mxcore.storage.remote.shared_reads import SHARED_BATCH_BYTES, SharedReads
from mxserver.wire.errors import DiskFull, ModelNotFound
from mxserver.wire.files.model_client import ModelClient, ModelFiles
from mxserver.wire.proto import load_pb2
from vllm_plugin import compat
from vllm_plugin.checkpoint import find_checkpoint, model_name
from vllm_plugin.remote_loader import FolderLoader, RemoteLoader

if TYPE_CHECKING:
    from vllm_plugin.loading import Load

__all__ = ["CacheRung"]

_log = logging.getLogger("vllm.modelexpress")


class CacheRung:
    """Weights out of the server's cache; with MODEL_EXPRESS_NO_SHARED_STORAGE=1 over gRPC."""

    name = "cache"
    tries = 1
    is_last_resort = False

    def __init__(self, load: Load) -> None:
        self._load = load
        self._client: ModelClient | None = None
        self._listed: ModelFiles | None = None
        self._shared: Path | None = None

    @property
    def _model(self) -> str:
        return model_name(self._load.model_config.model)

    @property
    def _revision(self) -> str | None:
        load = self._load
        found = find_checkpoint(load.model_config.model, load.model_config.revision, load.load_config.download_dir)
        return found.commit or load.model_config.revision or load.settings.model_revision or None

    def poll(self) -> PollResult:
        """Taken when the cache has the model, or, without shared storage, when it is to get it."""
        load = self._load
        over_grpc = load.settings.no_shared_storage
        if load.settings.server_address is None:
            return skip("no server is set")
        if Path(self._model).is_absolute():
            return skip(f"{self._model} is a folder of this machine, and no model that the server could have")
        try:
            self._listed = self._opened().list_files(self._model, revision=self._revision)
        except ModelNotFound:
            self._listed = None
        if self._listed is None or not has_weights(self._listed):
            self._listed = None
            if not over_grpc:
                return skip(f"the server's cache does not have the weights of {self._model}")
            return take(f"MODEL_EXPRESS_NO_SHARED_STORAGE=1: the server gets {self._model} and streams it")
        if over_grpc:
            bytes_text = f"{len(self._listed.files)} files, {self._listed.size_bytes} bytes"
            return take(
                f"MODEL_EXPRESS_NO_SHARED_STORAGE=1: {bytes_text} over gRPC from {load.settings.server_address}"
            )
        self._shared, reason = same_files_here(self._listed)
        if self._shared is None:
            return skip(f"{reason} (MODEL_EXPRESS_NO_SHARED_STORAGE=1 takes the files over gRPC)")
        return take(reason)

    def _opened(self) -> ModelClient:
        if self._client is None:
            self._client = ModelClient(self._load.settings.server_address or "")
            self._load.on_end(self._client.close)
        return self._client

    def load(self) -> nn.Module:
        """A model with the cache's weights; raises MxError, OSError, and what building a model raises."""
        load, client = self._load, self._opened()
        started = time.monotonic()
        shared = self._shared is not None
        with load.loading(load_pb2.LOAD_PATH_STORAGE if shared else load_pb2.LOAD_PATH_SERVER) as way:
            if self._listed is None:
                client.ensure(self._model, revision=self._revision)
                self._listed = client.list_files(self._model, revision=self._revision)
            folder = self._shared
            if folder is None and load.settings.cache_weights:
                folder = self._fetched(client, self._listed, way)
            if folder is not None:
                loader, digest = self._from_folder(folder, way)
            else:
                loader, digest = self._streamed(client, self._listed, way)
            model = load.build(loader)
        load.checkpoint_digest = digest
        load.tell_stored("cache", model, time.monotonic() - started)
        return model

    def _fetched(self, client: ModelClient, listed: ModelFiles, way: Progress) -> Path | None:
        """The snapshot in the hub's cache, or None where that has no room or cannot be written: weights need no disk.

        Ranks of a node fetch one after the other: all but the first find it.
        """
        done_bytes, lock = [0], threading.Lock()

        def on_bytes(count: int) -> None:
            with lock:
                done_bytes[0] += count
            way(done_bytes[0], listed.size_bytes)

        cache = hub_cache(self._load.load_config.download_dir)
        try:
            return client.fetch_to_hub_cache(self._model, cache, revision=self._revision, on_bytes=on_bytes)
        except (DiskFull, OSError) as error:
            _log.warning("the weights go straight into the model, as with MX_CACHE_WEIGHTS=0: %s", error)
            self._load.report.fallbacks.append(f"{self.name}, past the disk: {error}")
            return None

    def _from_folder(self, folder: Path, way: Progress) -> tuple[FolderLoader, str]:
        load = self._load
        found = find_checkpoint(str(folder))
        if not found.weight_files:
            raise CheckpointError(f"{folder}: no complete checkpoint there")
        digest = checkpoint_digest(found.weight_files, found.index_file)
        return FolderLoader(load.load_config, load.settings, load.filled, way, load.model_config.model, folder), digest

    def _streamed(self, client: ModelClient, listed: ModelFiles, way: Progress) -> tuple[RemoteLoader, str]:
        """MX_CACHE_WEIGHTS=0: nothing touches the disk."""
        load = self._load
        folder = ServerFolder(client, self._model, listed)
        load.on_end(folder.close)
        checkpoint = open_remote(folder)
        ranks = compat.ranks_here(load.vllm_config)
        shared = SharedReads(folder.name, folder.files, ranks, folder.read_into)
        load.on_end(shared.close)
        batch_bytes = SHARED_BATCH_BYTES if ranks > 1 else BATCH_BYTES
        loader = RemoteLoader(
            load.load_config,
            load.settings,
            load.filled,
            way,
            load.model_config.model,
            checkpoint,
            lambda names, tell: stream_remote(
                folder, checkpoint, names, read=shared.read_into, batch_bytes=batch_bytes, progress=tell
            ),
        )
        return loader, remote_digest(folder)

    def undo(self) -> None:
        """What was found of a model that is given up may not be offered."""
        self._load.forget_model()

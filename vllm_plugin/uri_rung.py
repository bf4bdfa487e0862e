"""The rung `uri`: MX_MODEL_URI, a folder of this machine or a prefix of an object store."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from torch import nn

from mxcore.errors import CheckpointError
from mxcore.load_ladder import PollResult, skip, take
from mxcore.settings import WorkerSettings
from mxcore.storage.checkpoint.content_digest import checkpoint_digest
from mxcore.storage.plan.progress import Progress
from mxcore.storage.remote.model_uri import ModelUri, missing_packages, parse_model_uri
from mxcore.storage.remote.object_store import ObjectFolder, ObjectOptions
from mxcore.storage.remote.remote_folder import BATCH_BYTES, open_remote, remote_digest, stream_remote
from mxcore.storage.remote.shared_reads import SHARED_BATCH_BYTES, SharedReads
from mxserver.wire.proto import load_pb2
from vllm_plugin import compat
from vllm_plugin.checkpoint import Checkpoint, find_checkpoint
from vllm_plugin.remote_loader import FolderLoader, RemoteLoader

if TYPE_CHECKING:
    from vllm_plugin.loading import Load

__all__ = ["UriPlace", "UriRung"]


class UriPlace:
    """What MX_MODEL_URI names, opened at its first use and kept for the load. One thread at a time."""

    def __init__(self, text: str, settings: WorkerSettings) -> None:
        self._text = text
        self._settings = settings
        self._uri: ModelUri | None = None
        self._folder: ObjectFolder | None = None
        self._digest = ""

    @property
    def uri(self) -> ModelUri:
        """Raises SettingError."""
        if self._uri is None:
            self._uri = parse_model_uri(self._text)
        return self._uri

    def objects(self) -> ObjectFolder:
        """The folder in the store; raises ObjectStoreError."""
        if self._folder is None:
            self._folder = ObjectFolder(self.uri, ObjectOptions.of(self._settings))
        return self._folder

    def files(self) -> Checkpoint:
        """The files of a local folder; raises CheckpointError where there are no safetensors or not all of them."""
        found = find_checkpoint(str(self.uri.folder))
        if not found.weight_files:
            raise CheckpointError(f"MX_MODEL_URI={self.uri.text}: no complete checkpoint there")
        return found

    def digest(self) -> str:
        """What tells this checkpoint apart, the same for local files and objects; raises MxError."""
        if not self._digest:
            if self.uri.is_local:
                found = self.files()
                self._digest = checkpoint_digest(found.weight_files, found.index_file)
            else:
                self._digest = remote_digest(self.objects())
        return self._digest

    def close(self) -> None:
        """Idempotent; it opens again at its next use."""
        folder, self._folder = self._folder, None
        if folder is not None:
            folder.close()


class UriRung:
    """Streams safetensors from MX_MODEL_URI."""

    name = "uri"
    tries = 1
    is_last_resort = False

    def __init__(self, load: Load) -> None:
        self._load = load

    def poll(self) -> PollResult:
        """Taken when a checkpoint is there."""
        place = self._load.uri
        if place is None:
            return skip("MX_MODEL_URI is not set")
        if missing := missing_packages(place.uri, streamer=self._load.settings.object_reader == "runai"):
            return skip(f"{place.uri.text}: {missing}")
        if place.uri.is_local:
            return take(f"{place.uri.text}: {len(place.files().weight_files)} weight files")
        folder = place.objects()
        weights = [file for file in folder.files if file.path.endswith(".safetensors")]
        return take(f"{folder.name}: {len(weights)} weight files, {sum(file.size_bytes for file in weights)} bytes")

    def load(self) -> nn.Module:
        """A model with the weights of that place; raises MxError, and what building a model raises."""
        load = self._load
        if load.uri is None:
            raise CheckpointError("MX_MODEL_URI is not set")
        path = load_pb2.LOAD_PATH_STORAGE if load.uri.uri.is_local else load_pb2.LOAD_PATH_OBJECT_STORE
        started = time.monotonic()
        digest = load.uri.digest()
        with load.loading(path) as way:
            loader = self._loader(load.uri, way)
            model = load.build(loader)
        load.checkpoint_digest = digest
        size_bytes = loader.checkpoint.total_bytes if isinstance(loader, RemoteLoader) else 0
        load.tell_stored("uri", model, loader.seconds or time.monotonic() - started, size_bytes)
        return model

    def _loader(self, place: UriPlace, way: Progress) -> FolderLoader | RemoteLoader:
        load = self._load
        common = (load.load_config, load.settings, load.filled, way, load.model_config.model)
        if place.uri.is_local:
            return FolderLoader(*common, place.files().folder or place.uri.folder)
        folder = place.objects()
        checkpoint = open_remote(folder)
        ranks = compat.ranks_here(load.vllm_config)
        shared = SharedReads(folder.name, folder.files, ranks, folder.read_into)
        load.on_end(shared.close)
        return RemoteLoader(
            *common,
            checkpoint,
            lambda names, tell: stream_remote(
                folder,
                checkpoint,
                names,
                read=shared.read_into,
                batch_bytes=SHARED_BATCH_BYTES if ranks > 1 else BATCH_BYTES,
                progress=tell,
            ),
        )

    def undo(self) -> None:
        """What was found of a model that is given up may not be offered; the store's connections are closed."""
        self._load.forget_model()
        if self._load.uri is not None:
            self._load.uri.close()

"""The rung `uri`: MX_MODEL_URI, a folder of this machine or a prefix of an object store."""

from __future__ import annotations

from mxcore.engine.context import LoadContext
from mxcore.engine.loaded import Loaded, Stored, load_stored
from mxcore.engine.model_files import UriPlace, find_checkpoint
from mxcore.engine.protocol import Files
from mxcore.engine.rungs.remote import streamed
from mxcore.errors import CheckpointError
from mxcore.load_ladder import PollResult, Rung, skip, take
from mxcore.storage.remote import listing_commit, missing_packages, state_of
from mxserver.wire.proto import load_pb2

__all__ = ["UriRung"]


class UriRung(Rung[Loaded]):
    """Streams safetensors from MX_MODEL_URI."""

    name = "uri"

    def __init__(self, context: LoadContext) -> None:
        self._context = context

    def poll(self) -> PollResult:
        """Taken when a checkpoint is there."""
        place = self._context.uri
        if place is None:
            return skip("MX_MODEL_URI is not set")
        if missing := missing_packages(place.uri):
            return skip(f"{place.uri.text}: {missing}")
        self._check_state(place)
        if place.uri.is_local:
            return take(f"{place.uri.text}: {len(place.files().weight_files)} weight files")
        folder = place.objects()
        weights = [file for file in folder.files if file.path.endswith(".safetensors")]
        return take(f"{folder.name}: {len(weights)} weight files, {sum(file.size_bytes for file in weights)} bytes")

    def _check_state(self, place: UriPlace) -> None:
        """Raises CheckpointError where the configuration was read of another state: these weights may not fit it."""
        engine = self._context.engine
        configured = find_checkpoint(engine.model, engine.revision, engine.download_dir).folder
        state = state_of(configured) if configured is not None else ""
        if state and state != listing_commit(place.listed()):
            raise CheckpointError(
                f"{place.uri.text} has changed since the configuration was read of it: start the worker again"
            )

    def load(self) -> Loaded:
        """A model with the weights of that place; raises MxError, and what building a model raises."""
        place = self._context.uri
        if place is None:
            raise CheckpointError("MX_MODEL_URI is not set")
        path = load_pb2.LOAD_PATH_STORAGE if place.uri.is_local else load_pb2.LOAD_PATH_OBJECT_STORE
        return load_stored(self._context, "uri", path, lambda progress: self._stored(place))

    def _stored(self, place: UriPlace) -> Stored:
        """Files are looked at twice; of objects the store itself says when one was replaced."""
        if place.uri.is_local:
            return Stored(Files(place.uri.folder), lambda: place.files().digest())
        digest = place.digest
        return Stored(streamed(self._context, place.objects()), lambda: digest)

    def undo(self) -> None:
        """The store's connections are closed."""
        if self._context.uri is not None:
            self._context.uri.close()

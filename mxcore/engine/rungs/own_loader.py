"""The rung `engine`: the engine's own loader and files."""

from __future__ import annotations

from mxcore.engine.context import LoadContext
from mxcore.engine.loaded import Loaded, load_stored
from mxcore.engine.protocol import Files
from mxcore.load_ladder import PollResult, Rung, take
from mxserver.wire.proto import load_pb2

__all__ = ["EngineRung"]


class EngineRung(Rung[Loaded]):
    """The engine's own loader, with the bytes of safetensors files read by mxcore.storage."""

    name = "engine"
    is_last_resort = True

    def __init__(self, context: LoadContext) -> None:
        self._context = context

    def poll(self) -> PollResult:
        """Always taken."""
        engine, reader = self._context.engine, self._context.settings.storage_reader
        return take(f"{engine.model} by {engine.own_loader} (MX_STORAGE_READER={reader})")

    def load(self) -> Loaded:
        """A model as the engine's own loader makes it; raises what that raises."""
        return load_stored(
            self._context,
            "storage",
            load_pb2.LOAD_PATH_STORAGE,
            lambda progress: (Files(), None),
            reading_alone=self._context.membership is not None,
        )

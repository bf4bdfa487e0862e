"""The rung `engine`: the engine's own loader and files."""

from __future__ import annotations

from mxcore.engine.context import LoadContext
from mxcore.engine.loaded import Loaded, Stored, load_stored
from mxcore.engine.protocol import Files
from mxcore.load_ladder import PollResult, Rung, take
from mxcore.transfer.member import CHECKPOINT_PARAMETER
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
        engine, mode = self._context.engine, self._context.settings.read_mode
        return take(f"{engine.model} by {engine.own_loader} (MX_READ_MODE={mode})")

    def load(self) -> Loaded:
        """A model as the engine's own loader makes it; raises what that raises."""
        return load_stored(
            self._context,
            "storage",
            load_pb2.LOAD_PATH_STORAGE,
            lambda progress: Stored(Files(), self._digest),
            reading_alone=self._context.membership is not None,
        )

    def _digest(self) -> str | None:
        """Of the engine's files as they are; None where nobody asks for it, or they cannot be read."""
        context = self._context
        if context.membership is None:
            return None
        found: list[str] = []
        with context.fallbacks.attempt("looking at the weight files"):
            found.append(context.identity(context.kind, None).extra_parameters[CHECKPOINT_PARAMETER])
        return found[0] if found else None

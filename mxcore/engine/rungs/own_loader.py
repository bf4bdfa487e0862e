"""The rung `engine`: the engine's own loader and files."""

from __future__ import annotations

from dataclasses import replace

from mxcore.engine.context import LoadContext
from mxcore.engine.loaded import Loaded, load_stored
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
        engine, reader = self._context.engine, self._context.settings.storage_reader
        return take(f"{engine.model} by {engine.own_loader} (MX_STORAGE_READER={reader})")

    def load(self) -> Loaded:
        """A model as the engine's own loader makes it; raises what that raises.

        It is offered under what the files were while they were read, or not at all where they changed meanwhile.
        """
        before = self._digest()
        loaded = self._read()
        if not loaded.kept or before is None:
            return loaded
        after = self._digest()
        if after is None or (before and after != before):  # "": they were downloaded just now
            self._context.fallbacks.append(
                f"the weight files of {self._context.engine.model} changed while they were read: not offered"
            )
            return replace(loaded, kept=())
        return replace(loaded, checkpoint=after)

    def _digest(self) -> str | None:
        """Of the engine's files as they are; None where nobody asks for it, or they cannot be read."""
        context = self._context
        if context.membership is None:
            return None
        found: list[str] = []
        with context.fallbacks.attempt("looking at the weight files"):
            found.append(context.identity(context.kind, None).extra_parameters[CHECKPOINT_PARAMETER])
        return found[0] if found else None

    def _read(self) -> Loaded:
        return load_stored(
            self._context,
            "storage",
            load_pb2.LOAD_PATH_STORAGE,
            lambda progress: (Files(), None),
            reading_alone=self._context.membership is not None,
        )

"""The rung of an update to a published version: what a trainer offers by `publish`, from all that have it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from mxcore.engine.context import LoadContext
from mxcore.engine.loaded import Loaded, Stored, load_stored
from mxcore.engine.protocol import Streamed
from mxcore.engine.update.running import Running
from mxcore.errors import DigestMismatch, SignatureError
from mxcore.exchange import HeldVersion, PublishedVersion
from mxcore.load_ladder import PollResult, Rung, take
from mxcore.storage.plan import Progress
from mxserver.wire.proto import load_pb2

__all__ = ["PublishedRung"]


class PublishedRung(Rung[Loaded]):
    """What the engine holds of the version before is not sent again; afterwards it holds, and gives, this one.

    `wanted` is the digest of the weights that are meant: what is held and has it is taken without asking anybody.
    """

    name = "p2p"

    def __init__(
        self, context: LoadContext, running: Running, published: PublishedVersion, wanted: Callable[[], str]
    ) -> None:
        self._context = context
        self._running = running
        self._published = published
        self._wanted = wanted
        self._taken: HeldVersion | None = None

    def poll(self) -> PollResult:
        """Always taken: there is no other place."""
        return take(f"version {self._published.version} of {self._published.name!r}, as it is published")

    def load(self) -> Loaded:
        """A model with the version's weights. Raises MxError, and what building a model raises."""
        if self._context.signed is not None:
            raise SignatureError(
                f"version {self._published.version} of {self._published.name!r} is published and not signed, and "
                "MX_MODEL_SIGNATURE=require (docs/how-to/signing.md)"
            )
        loaded = load_stored(self._context, "p2p", load_pb2.LOAD_PATH_UNSPECIFIED, self._stored, reading_alone=False)
        received = self._taken.bytes_received if self._taken is not None else 0
        return replace(loaded, part=replace(loaded.part, bytes=received))

    def _stored(self, progress: Progress) -> Stored:
        version, wanted = self._running.published, self._wanted()
        if version is None or version.digest != wanted:
            stopped = self._context.agreement.is_given_up
            version = self._taken = self._published.take(version, progress, stopped=stopped)
        if version.digest != wanted:
            raise DigestMismatch(
                f"version {self._published.version} of {self._published.name!r} is not what it was: its publisher "
                "gives each state another version"
            )
        return Stored(
            Streamed(version.checkpoint, lambda names, _progress: version.tensors(names)), lambda: version.digest
        )

    def done(self) -> None:
        """The version before is let go."""
        if self._taken is not None:
            self._running.hold(self._taken)

    def undo(self) -> None:
        """What was taken is let go; what was held before stays."""
        taken, self._taken = self._taken, None
        if taken is not None:
            taken.close()

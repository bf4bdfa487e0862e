"""The rung `p2p` of an update: processed weights of other workers, straight into the model's memory."""

from __future__ import annotations

from functools import partial

from mxcore.agreement import SiblingFailed
from mxcore.engine.context import LoadContext
from mxcore.engine.loaded import Loaded
from mxcore.engine.rungs import PeerRung, Tried
from mxcore.engine.update.running import Running
from mxcore.engine.weights import Weights
from mxcore.errors import LayoutUnsupported, SourceUnreachable

__all__ = ["LiveRung"]


class LiveRung(PeerRung):
    """Taken where layout and structure are equal and nothing of the model is packed away; addresses stay.

    What fails on the way leaves some bytes of either version: the model is whole again when another rung has loaded.
    """

    def __init__(self, context: LoadContext, tried: Tried, running: Running) -> None:
        super().__init__(context, tried)
        self._running = running

    def _loaded(self) -> Loaded:
        context, running = self._context, self._running
        if running.constructed is None:
            raise LayoutUnsupported("how this model was built is not known")
        weights = Weights("processed", context.engine.device)
        attempt = self._begin(weights)
        weights.runs(running.model, running.constructed.built)
        weights.processed(running.model, partial(self._receive, attempt, None))
        if weights.received is None:
            raise SourceUnreachable("nothing was received")
        attempt.others_may_do = True
        kept = (weights,) if "processed" in context.kept_kinds else ()
        part = self._part(attempt, weights.received, {})
        return Loaded(running.model, kept, attempt.checkpoint, part, None, weights.received.bytes_from)

    def _before_receiving(self) -> None:
        """Once all processes have found weights that fit."""
        if trouble := self._context.agreement.agree():
            raise SiblingFailed(trouble)
        self._running.begin_writing()

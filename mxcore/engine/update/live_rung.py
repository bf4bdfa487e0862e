"""The rungs `p2p` and `fleet` of an update: processed weights of other workers, straight into the model's memory."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import nn

from mxcore.agreement import SiblingFailed
from mxcore.engine.context import LoadContext
from mxcore.engine.loaded import Loaded
from mxcore.engine.rungs import Attempt, FleetRung, PeerRung, Tried
from mxcore.engine.update.running import Running
from mxcore.engine.weights import Fit, Weights
from mxcore.errors import FenceFailed, LayoutUnsupported, SourceUnreachable
from mxcore.load_ladder import Rung, reason_of
from mxcore.transfer.receive import ReceiveReport
from mxserver.wire import MxError

__all__ = ["LiveFleetRung", "LiveRung", "live"]


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

    def _receive(self, attempt: Attempt, unprocessed: nn.Module | None, fit: Fit) -> ReceiveReport:
        try:
            return super()._receive(attempt, unprocessed, fit)
        except MxError as error:
            if fence := next((each for each in (error, error.__cause__) if isinstance(each, FenceFailed)), None):
                self._running.lost = reason_of(fence)
            raise

    def _before_receiving(self) -> None:
        """Once all processes have found weights that fit."""
        if trouble := self._context.agreement.agree():
            if self._attempt is not None:
                self._attempt.others_may_do = True
            raise SiblingFailed(trouble)
        self._running.begin_writing()


class LiveFleetRung(LiveRung, FleetRung):
    """The same, from a worker that is waited for."""


def live(rungs: Sequence[Rung[Loaded]], context: LoadContext, running: Running) -> list[Rung[Loaded]]:
    """A load's rungs, with these in the place of those that receive processed weights."""
    tried = Tried(context.cannot_receive)
    kinds: dict[type, type[LiveRung]] = {PeerRung: LiveRung, FleetRung: LiveFleetRung}
    if context.kind != "processed":
        return list(rungs)
    return [kinds[type(rung)](context, tried, running) if type(rung) in kinds else rung for rung in rungs]

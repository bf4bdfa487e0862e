"""The rungs `p2p` and `fleet`: weights of other workers, memory to memory."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from torch import nn

from mxcore.agreement import SiblingFailed
from mxcore.engine.context import LoadContext
from mxcore.engine.loaded import BuiltModel, Keeping, Loaded, built
from mxcore.engine.protocol import Fill
from mxcore.engine.report import LoadedPart
from mxcore.engine.rungs.missing_chunks import fill_missing
from mxcore.engine.weights import Built, Fit, Kind, Weights
from mxcore.errors import ChunksMissing, SourceUnreachable, TransferError
from mxcore.load_ladder import PollResult, Rung, reason_of, skip, take
from mxcore.transfer.layout import Manifest, Placement
from mxcore.transfer.member import CHECKPOINT_PARAMETER, Membership, manifest_of
from mxcore.transfer.move import Source
from mxcore.transfer.receive import ReceiveReport
from mxserver.wire.proto import load_pb2

__all__ = ["Attempt", "FleetRung", "PeerRung", "RawRung", "Tried"]

_log = logging.getLogger(__name__)


@dataclass
class Tried:
    """What a load has learned of workers; its rungs that receive share it.

    `failed` are those whose transfers failed; `cannot_receive` why none can help, whoever it is.
    """

    cannot_receive: str = ""
    failed: set[str] = field(default_factory=set)


@dataclass
class Attempt:
    """One model that is filled by peers: raw weights before processing; processed ones after it, over what it made.

    `checkpoint` is what the sources say that it is.
    After a failure `others_may_do` says that it was the sources' and not this model's.
    """

    weights: Weights
    checkpoint: str = ""
    bytes_from_storage: int = 0
    others_may_do: bool = False


class PeerRung(Rung[Loaded]):
    """Weights of workers that have all of them, now."""

    name = "p2p"

    def __init__(self, context: LoadContext, tried: Tried) -> None:
        self._context = context
        self._tried = tried
        self._sources: Sequence[Source] = ()
        self._attempt: Attempt | None = None

    @property
    def _kind(self) -> Kind:
        return self._context.kind

    def poll(self) -> PollResult:
        """Taken when a worker is READY."""
        if reason := self._hopeless():
            return skip(reason)
        self._sources = self._found()
        if not self._sources:
            return skip(self._nobody())
        workers = ", ".join(source.worker_id for source in self._sources[:3])
        return take(f"{len(self._sources)} workers have these weights or some of them: {workers}")

    def _hopeless(self) -> str:
        """Why nobody needs to be looked for; empty if that is not so."""
        return self._context.alone if self._context.membership is None else self._tried.cannot_receive

    def _found(self) -> Sequence[Source]:
        membership = self._membership()
        if membership is None:
            return ()
        listed = membership.find_sources(match_any_checkpoint=self._context.any_checkpoint, receiving=True)
        found = [source for source in listed if source.worker_id not in self._tried.failed]
        return found if any(not source.receiving for source in found) else ()

    def _membership(self) -> Membership | None:
        """Where sources are looked for, and who receives."""
        return self._context.membership

    def _nobody(self) -> str:
        failed = self._tried.failed
        others = f" but those that failed ({', '.join(sorted(failed))})" if failed else ""
        membership = self._membership()
        nearest = membership.differs_least() if membership is not None else ""
        told = f"; {nearest}" if nearest else ""
        return f"no worker{others} has these weights for rank {self._context.rank}{told}"

    def load(self) -> Loaded:
        """A model with the sources' weights; raises TransferError, and whatever building a model raises."""
        try:
            return self._loaded()
        except Exception as error:
            self._context.refused("receive", error)
            raise

    def _loaded(self) -> Loaded:
        context, is_raw = self._context, self._kind == "raw"
        weights, keeping = Weights(self._kind, context.device_of(self._kind)), Keeping(context)
        attempt = self._begin(weights)

        def fill(model: nn.Module) -> None:
            before = Built(model, weights.device, context.engine.configuration, copies=True)
            if not is_raw:
                context.engine.fill_placeholder(model)
            context.engine.finish_filling(model)
            weights.loaded(model, before, partial(self._receive, attempt, model) if is_raw else None)
            keeping.filled(model, before, weights)

        model, steps, constructed = self._built(attempt, fill, with_placeholder=not is_raw)
        with steps.step("fill"):
            if not is_raw:
                weights.processed(model, partial(self._receive, attempt, None))
        received = weights.received
        if received is None:
            raise SourceUnreachable("nothing was received: the engine has filled no model")
        if received.in_clear:
            context.fallbacks.append(
                f"{self.name}: weights came in clear, for UCX has no TLS (docs/explanation/threat-model.md)"
            )
        with steps.step("keep"):
            kept = keeping.processed(model)
        attempt.others_may_do = True  # if it comes to nothing, a sibling is why
        part = self._part(attempt, received, steps)
        return Loaded(model, kept, attempt.checkpoint, part, constructed, received.bytes_from)

    def _begin(self, weights: Weights) -> Attempt:
        self._attempt = Attempt(weights)
        return self._attempt

    def _part(self, attempt: Attempt, received: ReceiveReport, steps: Mapping[str, float]) -> LoadedPart:
        return LoadedPart(
            path="p2p",
            layout=self._kind,
            tensors=received.tensors,
            bytes=received.bytes,
            seconds=received.seconds,
            chunks_verified=received.chunks_verified,
            bytes_from_storage=attempt.bytes_from_storage,
            source_worker=received.source_worker_id,
            operation=received.operation,
            transport=received.transport,
            steps=steps,
        )

    def done(self) -> None:
        """The copies of what building computed are freed."""
        self._attempt = None

    def _built(self, attempt: Attempt, fill: Fill, *, with_placeholder: bool) -> BuiltModel:
        try:
            return built(self._context, fill, with_placeholder=with_placeholder)
        except SiblingFailed:
            attempt.others_may_do = True
            raise

    def _fitting(self, membership: Membership, fit: Fit) -> tuple[Manifest, Placement]:
        """The first manifest that fits this model. Raises what the last holder that was asked was left for."""
        failure: TransferError = SourceUnreachable("there is no worker to receive weights from")
        timeout = min(membership.settings.server_timeout_seconds, membership.settings.stall_timeout_seconds)
        for source in self._sources:
            try:
                manifest = manifest_of(source, timeout_seconds=timeout)
                return manifest, fit(manifest)
            except TransferError as error:
                failure = error
                _log.warning("worker %s is left aside: %s", source.worker_id, error)
        raise failure

    def _receive(self, attempt: Attempt, unprocessed: nn.Module | None, fit: Fit) -> ReceiveReport:
        """From workers; with `unprocessed`, what they could not give any more comes from storage."""
        context, membership = self._context, self._membership()
        if membership is None:
            raise SourceUnreachable("no membership: there is nobody to receive from")
        attempt.checkpoint = membership.identity.extra_parameters[CHECKPOINT_PARAMETER]
        relays = (
            membership is context.membership and self._kind in context.kept_kinds and not context.engine.loses_memory()
        )
        relay_from = attempt.weights if relays else None
        has_files = unprocessed is not None and _files_are_the_same(context)
        try:
            manifest, placement = self._fitting(membership, fit)
            self._before_receiving()
            try:
                return membership.receive(
                    manifest.layout,
                    placement,
                    manifest.scalars,
                    self._sources,
                    relay_from=relay_from,
                    files_decide=has_files,
                    keep_alive=attempt.weights,
                    stopped=context.agreement.is_given_up,
                )
            except ChunksMissing as error:
                if error.partial is None or unprocessed is None or not has_files:
                    raise
                context.fallbacks.append(f"{self.name}, the rest from storage: {error}")
                attempt.bytes_from_storage = fill_missing(error.partial, unprocessed, context)
                whole: ReceiveReport = error.partial.complete()
                with membership.loads.loading(load_pb2.LOAD_PATH_UNSPECIFIED) as step:  # the receive has failed
                    whole.tell(step)
                return whole
        except TransferError as error:
            attempt.others_may_do = True
            if context.agreement.is_given_up():  # then that is why: what is received here comes to nothing
                raise SiblingFailed(context.agreement.agree(reason_of(error))) from error
            self._tried.failed.update(source.worker_id for source in self._sources)
            raise

    def _before_receiving(self) -> None:
        """When a holder's weights fit, before the first byte of them arrives. May raise."""

    def undo(self) -> None:
        """Nothing more is relayed; what building computed is back."""
        context = self._context
        attempt, self._attempt = self._attempt, None
        if attempt is not None and not attempt.others_may_do and self._kind == context.kind:
            self._tried.cannot_receive = "this model's weights cannot be taken from a worker, whoever it is"
        if context.membership is not None:
            with context.fallbacks.attempt("withdrawing what was relayed"):
                context.membership.withdraw()
        if attempt is not None:
            attempt.weights.undo()


def _files_are_the_same(context: LoadContext) -> bool:
    """Whether the engine's own files are of the checkpoint that workers give, and may be read by us."""
    return (
        context.role.reads_storage
        and not context.any_checkpoint
        and context.settings.storage_reader != "engine"
        and context.uri is None  # the digest is that of files elsewhere
    )


class FleetRung(PeerRung):
    """Weights of a worker that reads them for all: waited for, at most MX_SOURCE_WAIT_SECS."""

    name = "fleet"

    def __init__(self, context: LoadContext, tried: Tried) -> None:
        super().__init__(context, tried)
        self._tries_left = 2

    def _found(self) -> Sequence[Source]:
        context = self._context
        if context.membership is None:
            return ()
        return context.membership.wait_for_source(
            match_any_checkpoint=context.any_checkpoint,
            avoid=self._tried.failed,
            stopped=context.agreement.is_given_up,
        )

    def _nobody(self) -> str:
        return "nobody else loads them, or not in time: this worker's turn to read storage"

    def again(self) -> bool:
        """Once: whom it waited for may fail, and somebody else reads then."""
        self._tries_left -= 1
        return self._tries_left > 0


class RawRung(PeerRung):
    """Raw weights of a source whose processed layout is another one, or which offers only raw ones: processed here."""

    def __init__(self, context: LoadContext, tried: Tried) -> None:
        super().__init__(context, tried)
        self._raw_membership: Membership | None = None

    @property
    def _kind(self) -> Kind:
        return "raw"

    def _membership(self) -> Membership | None:
        context = self._context
        if self._raw_membership is None and context.membership is not None:
            self._raw_membership = context.new_membership(context.identity("raw", context.uri_digest))
            context.at_end.callback(self._raw_membership.close)
        return self._raw_membership

    def _nobody(self) -> str:
        return f"no worker has the raw weights for rank {self._context.rank} either"

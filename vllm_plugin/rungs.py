"""The rungs of a load in vLLM: each fills a model through vLLM's own `load_model` from another place.

The ladder that tries them is `mxcore.load_ladder`; what they share of one load is `vllm_plugin.loading.Load`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from torch import nn

from mxcore.errors import ChunksMissing, SourceUnreachable, TransferError
from mxcore.load_ladder import PollResult, Rung, skip, take
from mxcore.transfer.layout.layout import Layout, Placement
from mxcore.transfer.member.membership import CHECKPOINT_PARAMETER, Membership
from mxcore.transfer.move.source_client import Source
from mxcore.transfer.receive.receiver import ReceiveReport
from mxserver.wire.proto import load_pb2
from vllm_plugin import compat
from vllm_plugin.cache_rung import CacheRung
from vllm_plugin.missing_chunks import fill_missing
from vllm_plugin.storage_loader import StorageLoader
from vllm_plugin.uri_rung import UriRung
from vllm_plugin.weights import FromPeer, FromStorage, Kind, Weights

if TYPE_CHECKING:
    from vllm_plugin.loading import Load

__all__ = ["EngineRung", "FleetRung", "PeerRung", "made_rungs"]


class PeerRung:
    """Weights of workers that have all of them, now."""

    name = "p2p"
    tries = 1
    is_last_resort = False

    def __init__(self, load: Load, kind: Kind | None = None) -> None:
        self._load = load
        self._kind = kind or load.kind
        self._sources: Sequence[Source] = ()
        self._loader: FromPeer | None = None
        self._others_may_do = False

    def poll(self) -> PollResult:
        """Taken when a worker is READY."""
        load = self._load
        if load.membership is None:
            return skip(load.alone)
        if load.cannot_receive:
            return skip(load.cannot_receive)
        self._sources = self._found()
        if not self._sources:
            return skip(self._nobody())
        workers = ", ".join(source.worker_id for source in self._sources[:3])
        return take(f"{len(self._sources)} workers have these weights or some of them: {workers}")

    def _found(self) -> Sequence[Source]:
        load = self._load
        membership = self._membership()
        if membership is None:
            return ()
        found = [
            source
            for source in membership.find_sources(match_any_checkpoint=load.any_checkpoint, receiving=True)
            if source.worker_id not in load.avoid
        ]
        return found if any(not source.receiving for source in found) else ()

    def _membership(self) -> Membership | None:
        """Where sources are looked for, and who receives."""
        return self._load.membership

    def _nobody(self) -> str:
        others = f" but those that failed ({', '.join(sorted(self._load.avoid))})" if self._load.avoid else ""
        return f"no worker{others} has these weights for rank {self._load.report.rank}"

    def load(self) -> nn.Module:
        """A model with the sources' weights; raises TransferError, and whatever building a model raises."""
        load = self._load
        weights = Weights(self._kind, load.device)
        self._loader = FromPeer(
            load.load_config,
            weights,
            lambda *what: self._receive(weights, *what),
            lambda model: load.filled(model, weights),
        )
        self._others_may_do = False
        model = load.build(self._loader)
        with load.step("fill"):
            self._loader.finish(model)
        self._loader.forget()
        load.report.path = "p2p"
        load.report.layout = self._kind
        with load.step("keep"):
            load.keep(model)
        return model

    def _receive(
        self, weights: Weights, layout: Layout, placement: Placement, scalars: Mapping[str, float]
    ) -> Mapping[str, float]:
        load, membership = self._load, self._membership()
        if membership is None:
            raise SourceUnreachable("no membership: there is nobody to receive from")
        relays = (
            membership is load.membership
            and self._kind in load.kept_kinds
            and not compat.may_lose_memory(load.vllm_config, load.model_config)
        )
        relay_from = weights if relays else None
        try:
            received = self._fetched(membership, layout, placement, scalars, relay_from)
        except TransferError:
            load.avoid.update(source.worker_id for source in self._sources)
            self._others_may_do = True
            raise
        load.received, load.received_weights = received, weights
        load.received_checkpoint = membership.identity.extra_parameters[CHECKPOINT_PARAMETER]
        load.report.tell_received(received)
        return received.scalars

    def _fetched(
        self,
        membership: Membership,
        layout: Layout,
        placement: Placement,
        scalars: Mapping[str, float],
        relay_from: object,
    ) -> ReceiveReport:
        """From workers; what they could not give any more, from storage if the weight files are here."""
        load, loader = self._load, self._loader
        try:
            return membership.receive(layout, placement, scalars, self._sources, relay_from=relay_from)
        except ChunksMissing as error:
            readable = self._kind == "raw" and load.role.reads_storage and not load.any_checkpoint
            readable = readable and load.settings.storage_reader != "engine"
            readable = readable and load.uri is None  # the digest is that of files elsewhere
            if error.partial is None or loader is None or loader.model is None or not readable:
                raise
            load.report.fallbacks.append(f"{self.name}, the rest from storage: {error}")
            filled = fill_missing(error.partial, loader.model, load.load_config, load.model_config, load.settings)
            load.report.bytes_from_storage = filled.read_bytes
            return filled.report

    def undo(self) -> None:
        """Nothing more is relayed; what building computed is back; the report knows of no transfer."""
        load = self._load
        if not self._others_may_do:
            load.cannot_receive = "this model's weights cannot be taken from a worker, whoever it is"
        load.forget_model()
        if load.membership is not None:
            load.attempt("withdrawing what was relayed", load.membership.withdraw)
        loader, self._loader = self._loader, None
        if loader is not None:
            loader.undo()


class FleetRung(PeerRung):
    """Weights of a worker that reads them for all: waited for, at most MX_SOURCE_WAIT_SECS."""

    name = "fleet"
    tries = 2  # whom it waited for may fail, and somebody else reads then

    def _found(self) -> Sequence[Source]:
        load = self._load
        if load.membership is None:
            return ()
        return load.membership.wait_for_source(match_any_checkpoint=load.any_checkpoint, avoid=load.avoid)

    def _nobody(self) -> str:
        return "nobody else loads them, or not in time: this worker's turn to read storage"


class RawRung(PeerRung):
    """Raw weights of a source whose processed layout is another one, or which offers only raw ones: processed here."""

    def __init__(self, load: Load) -> None:
        super().__init__(load, "raw")

    def _membership(self) -> Membership | None:
        return self._load.raw_membership()

    def _nobody(self) -> str:
        return f"no worker has the raw weights for rank {self._load.report.rank} either"

    def undo(self) -> None:
        """As PeerRung; that raw weights failed says nothing of others."""
        before = self._load.cannot_receive
        super().undo()
        self._load.cannot_receive = before


class EngineRung:
    """vLLM's default loader, with the bytes of safetensors files read by mxcore.storage."""

    name = "engine"
    tries = 1
    is_last_resort = True

    def __init__(self, load: Load) -> None:
        self._load = load

    def poll(self) -> PollResult:
        """Always taken."""
        reader = self._load.settings.storage_reader
        return take(f"{self._load.model_config.model} by vLLM's default loader (MX_STORAGE_READER={reader})")

    def load(self) -> nn.Module:
        """A model as vLLM's default loader makes it; raises what that raises."""
        load = self._load
        started = time.monotonic()
        with load.loading(load_pb2.LOAD_PATH_STORAGE) as way:
            if load.membership is None:
                loader = StorageLoader(load.load_config, load.settings)
            else:
                loader = FromStorage(load.load_config, load.settings, load.filled, way)
            model = load.build(loader)
        seconds = loader.seconds if isinstance(loader, FromStorage) else time.monotonic() - started
        load.checkpoint_digest = None
        load.tell_stored("storage", model, seconds)
        return model

    def undo(self) -> None:
        """What was found of a model that is given up may not be offered."""
        self._load.forget_model()


_MADE: dict[str, Callable[[Load], Rung[nn.Module]]] = {
    "p2p": PeerRung,
    "fleet": FleetRung,
    "uri": UriRung,
    "cache": CacheRung,
    "engine": EngineRung,
}


def made_rungs(load: Load, names: Sequence[str]) -> list[Rung[nn.Module]]:
    """The rungs of these names, in this order; names of rungs that this engine does not have are left out.

    After the workers that have processed weights come those that have raw ones.
    """
    rungs = [_MADE[name](load) for name in names if name in _MADE]
    if load.kind == "processed" and "p2p" in names:
        after = next(place for place, rung in enumerate(rungs) if rung.name == "p2p")
        rungs.insert(after + 1, RawRung(load))
    return rungs

"""One load: identity → membership → a peer's weights, else storage → serve.

The engine never ends because of us: what our part raises becomes a line in the log and in the report, and vLLM's own
default loader does the load, into a model built anew. Only what that loader raises reaches the engine.
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

from torch import nn
from vllm.config import LoadConfig, ModelConfig, VllmConfig
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from mxcore.errors import LayoutUnsupported, SourceUnreachable, TransferError
from mxcore.settings import load_settings
from mxcore.transfer.layout import Layout, Placement
from mxcore.transfer.membership import Membership
from mxcore.transfer.receiver import ReceiveReport
from mxcore.transfer.source_client import Source
from mxserver.wire import p2p_pb2
from mxserver.wire.errors import MxError
from vllm_plugin import compat, serving
from vllm_plugin.checkpoint import find_checkpoint
from vllm_plugin.identity import source_identity, worker_rank
from vllm_plugin.last_will import Record
from vllm_plugin.report import LoadReport
from vllm_plugin.storage_loader import StorageLoader
from vllm_plugin.weights import FromPeer, FromStorage, Kind, Weights

T = TypeVar("T")

_log = logging.getLogger(__name__)


def load_model(
    load_config: LoadConfig, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str = ""
) -> nn.Module:
    """Loads a model; raises what vLLM's default loader raises."""
    compat.route_logs()
    if compat.is_draft(vllm_config, model_config):
        _log.info("%s is a draft model: loaded from storage, not exchanged", model_config.model)
        loader = DefaultModelLoader(compat.plain_load_config(load_config, "auto"))
        return compat.load_model(loader, vllm_config, model_config, prefix)
    return _Load(load_config, vllm_config, model_config, prefix).run()


class _Load:
    def __init__(
        self, load_config: LoadConfig, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str
    ) -> None:
        self.load_config = load_config
        self.vllm_config = vllm_config
        self.model_config = model_config
        self.prefix = prefix
        self.device = compat.device(vllm_config)
        self.report = LoadReport(model=model_config.model)
        self.settings = load_settings({}, {})
        self.report_path = ""
        self.sources: list[Source] = []
        self.received: ReceiveReport | None = None
        self.transfer_failed = False
        self.membership: Membership | None = None
        self.weights: Weights | None = None  # what can be offered

    def run(self) -> nn.Module:
        started = time.monotonic()
        restore = compat.building_state(self.vllm_config)
        self.attempt("joining", self.join)
        model = self.from_peer() if self.sources else None
        if model is None and self.transfer_failed:
            restore()
            gc.collect()
            self.attempt("waiting for another source", self.wait_again)
            model = self.from_peer() if self.sources else None
        if model is None:
            restore()
            gc.collect()
            model = self.from_storage()
        self.attempt("serving", self.serve)
        self.report.load_seconds = round(time.monotonic() - started, 3)
        _log.info("%s", self.report.line())
        self.attempt("writing the report", self.write_report)
        return model

    def attempt(self, what: str, function: Callable[[], T]) -> T | None:
        """Runs a part of ours; None when it failed, which is then in the log and in the report."""
        try:
            return function()
        except MxError as error:
            self.report.fallbacks.append(f"{what}: {error}")
            _log.warning("%s failed: %s", what, error)
        except Exception as error:  # noqa: BLE001 - the engine must start; the log has the traceback
            self.report.fallbacks.append(f"{what}: {type(error).__name__}: {error}")
            _log.exception("%s failed by a fault of ours (please report it); the engine goes on without it", what)
        return None

    def join(self) -> None:
        """Settings, identity, membership, sources. After a failure there is no membership."""
        extra = dict(self.load_config.model_loader_extra_config or {})
        self.report_path = str(extra.pop("report_path", ""))
        self.settings = load_settings(extra)
        self.report.layout = self.kind
        self.report.rank = worker_rank(self.vllm_config)
        if self.settings.server_address is None:
            self.report.fallbacks.append("joining: no server is set")
            _log.warning(
                "no ModelExpress server is set: loading from storage, alone; "
                "set MODEL_EXPRESS_URL=host:port to take weights from other workers and to offer them"
            )
            return
        identity = self.identity()
        complete = bool(identity.extra_parameters["checkpoint"])
        membership = Membership(self.settings, identity, self.report.rank, compat.accelerator())
        try:
            if membership.join():
                self.sources = membership.wait_for_source(match_any_checkpoint=not complete)
            else:
                self.report.fallbacks.append(f"joining: no answer from the server at {self.settings.server_address}")
        except BaseException:
            self.sources = []
            membership.close()
            raise
        self.membership = membership

    def wait_again(self) -> None:
        """After a transfer that failed: whoever else has the weights, or will have read them for all."""
        avoid = {source.worker_id for source in self.sources}
        self.sources = []
        if self.membership is not None:
            self.sources = self.membership.wait_for_source(avoid=avoid)

    @property
    def kind(self) -> Kind:
        if self.settings.layout != "auto":
            return self.settings.layout
        return "processed" if compat.processed_weights_can_move() else "raw"

    def identity(self) -> p2p_pb2.SourceIdentity:
        checkpoint = find_checkpoint(self.model_config.model, self.model_config.revision, self.load_config.download_dir)
        return source_identity(self.vllm_config, self.model_config, self.kind, checkpoint, self.settings.model_revision)

    def from_peer(self) -> nn.Module | None:
        """A model with a peer's weights; None when that failed, and then nothing of it is left."""
        weights = Weights(self.kind, self.device)
        self.transfer_failed = False
        loader = FromPeer(self.load_config, weights, lambda *what: self.receive(weights, *what))

        def load() -> nn.Module:
            model = compat.load_model(loader, self.vllm_config, self.model_config, self.prefix)
            loader.finish(model)
            return model

        model = self.attempt(f"taking {self.kind} weights from a peer", load)
        if model is None:
            self.received = None
            if self.membership is not None:
                self.attempt("withdrawing what was relayed", self.membership.withdraw)
            self.attempt("undoing the transfer", loader.undo)
            return None
        loader.forget()
        self.report.path = "p2p"
        self.attempt("checking the raw weights after processing", lambda: self.keep(weights, model))
        return model

    def receive(
        self, weights: Weights, layout: Layout, placement: Placement, scalars: Mapping[str, float]
    ) -> Mapping[str, float]:
        if self.membership is None:
            raise SourceUnreachable("no membership: there is nobody to receive from")
        relay_from = None if compat.may_lose_memory(self.model_config) else weights
        try:
            received = self.membership.receive(layout, placement, scalars, self.sources, relay_from=relay_from)
        except TransferError:
            self.transfer_failed = True
            raise
        self.received = received
        self.report.tensors = received.tensors
        self.report.bytes = received.bytes
        self.report.seconds = received.seconds
        self.report.chunks_verified = received.chunks_verified
        self.report.source_worker = received.source_worker_id
        self.report.operation = received.operation
        self.report.transport = received.transport
        return received.scalars

    def from_storage(self) -> nn.Module:
        """A model as vLLM's default loader makes it; raises what that raises."""
        weights = Weights(self.kind, self.device)
        if self.membership is None:
            loader = StorageLoader(self.load_config, self.settings)
        else:
            loader = FromStorage(
                self.load_config,
                self.settings,
                lambda model: self.attempt(f"collecting {self.kind} weights", lambda: weights.loaded(model)),
            )
        started = time.monotonic()
        model = compat.load_model(loader, self.vllm_config, self.model_config, self.prefix)
        self.report.path = "storage"
        self.report.seconds = round(time.monotonic() - started, 6)
        if isinstance(loader, FromStorage):
            self.report.seconds = loader.seconds
            self.attempt(f"collecting {self.kind} weights", lambda: self.keep(weights, model))
            self.report.tensors = len(weights.found.tensors)
            self.report.bytes = weights.layout.total_bytes if weights.layout else 0
        return model

    def keep(self, weights: Weights, model: nn.Module) -> None:
        if weights.kind == "raw" or self.received is None:
            weights.processed(model)
        self.weights = weights

    def serve(self) -> None:
        """Offers what this worker has; leaves when there is nothing, or nothing that may be offered."""
        membership, weights = self.membership, self.weights
        if membership is None:
            return
        try:
            if weights is None or weights.layout is None or weights.placement is None:
                return
            if reason := compat.may_lose_memory(self.model_config):
                raise LayoutUnsupported(f"in {reason} weights can vanish while they are read: not offered")
            membership = self.under_own_name(membership)
            digests = self.received.digests if self.received is not None else None
            membership.serve(weights.layout, weights.placement, weights.found.scalars, digests, keep_alive=weights)
            self.report.serving = True
            self.report.source_id = membership.source_id
            self.report.worker_id = membership.worker_id
            address = self.settings.server_address or ""
            serving.stay(
                membership, Record(address, membership.source_id, membership.worker_id, membership.worker_rank)
            )
        finally:
            if not self.report.serving:
                membership.close()

    def under_own_name(self, membership: Membership) -> Membership:
        """The membership to serve in: another one when the load itself brought the checkpoint to this machine."""
        if self.received is not None or membership.identity.extra_parameters["checkpoint"]:
            return membership
        self.membership = Membership(self.settings, self.identity(), self.report.rank, compat.accelerator())
        self.membership.take_over_turn(membership)
        membership.close()
        self.membership.join()
        return self.membership

    def write_report(self) -> None:
        if self.report_path:
            self.report.write(self.report_path)

"""One load: identity → membership → the ladder of places that weights come from → serve.

The engine never ends because of us: what our part raises becomes a line in the log and in the report, and the next
rung does the load, into a model built anew; the last one is vLLM's own default loader. Only what that raises reaches
the engine, and LoadPathsExhausted if MX_LOAD_PATHS leaves that loader out.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TypeVar

from torch import nn
from vllm.config import LoadConfig, ModelConfig, VllmConfig
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from mxcore.errors import LayoutUnsupported
from mxcore.load_ladder import Ladder, Step
from mxcore.settings import load_settings
from mxcore.storage.progress import Progress
from mxcore.transfer.load_progress import LoadPath
from mxcore.transfer.membership import Membership
from mxcore.transfer.receiver import ReceiveReport
from mxserver.wire import p2p_pb2
from mxserver.wire.errors import MxError
from vllm_plugin import compat, serving
from vllm_plugin.checkpoint import find_checkpoint
from vllm_plugin.identity import source_identity, worker_rank
from vllm_plugin.last_will import Record
from vllm_plugin.report import LoadReport, StoredPath
from vllm_plugin.rungs import made_rungs
from vllm_plugin.uri_rung import UriPlace
from vllm_plugin.weights import Kind, Weights

T = TypeVar("T")

_log = logging.getLogger(__name__)


def load_model(
    load_config: LoadConfig, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str = ""
) -> nn.Module:
    """Loads a model; raises what vLLM's default loader raises, and LoadPathsExhausted where that is left out."""
    compat.route_logs()
    if compat.is_draft(vllm_config, model_config):
        _log.info("%s is a draft model: loaded from storage, not exchanged", model_config.model)
        loader = DefaultModelLoader(compat.plain_load_config(load_config, "auto"))
        return compat.load_model(loader, vllm_config, model_config, prefix)
    return Load(load_config, vllm_config, model_config, prefix).run()


class Load:
    """One load, and what its rungs share (vllm_plugin.rungs). One thread at a time."""

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
        self.membership: Membership | None = None
        self.alone = "this worker could not join"  # why there is no membership
        self.any_checkpoint = False  # no weight files here that could tell checkpoints apart
        self.avoid: set[str] = set()  # workers whose transfers failed
        self.cannot_receive = ""  # why no worker can help, whoever it is
        self.received: ReceiveReport | None = None
        self.weights: Weights | None = None  # what can be offered
        self.uri: UriPlace | None = None
        self.checkpoint_digest: str | None = None  # of what was loaded; None: of the engine's own files
        self._at_end = ExitStack()

    def run(self) -> nn.Module:
        started = time.monotonic()
        restore = compat.building_state(self.vllm_config)
        self.attempt("joining", self.join)
        ladder = Ladder(made_rungs(self, self.settings.load_paths), restore=restore, failed=self.note)
        try:
            model = ladder.climb()
        except BaseException:
            if self.membership is not None:
                self.membership.close()
            raise
        finally:
            self.report.paths = [step.as_json() for step in ladder.steps]
            self.attempt("closing what was read from", self._at_end.close)
        self.attempt("serving", self.serve)
        self.report.load_seconds = round(time.monotonic() - started, 3)
        _log.info("%s", self.report.line())
        self.attempt("writing the report", self.write_report)
        return model

    @contextmanager
    def loading(self, path: LoadPath) -> Iterator[Progress]:
        """Around a load that is no transfer: what it gives is to be told how far the load is, for the server's page."""
        if self.membership is None:
            yield lambda done_bytes, total_bytes: None
            return
        with self.membership.loading(path) as way:
            yield way

    def note(self, step: Step) -> None:
        """A rung failed."""
        self.report.fallbacks.append(str(step))

    def attempt(self, what: str, function: Callable[[], T]) -> T | None:
        """Runs a part of ours beside the rungs; None when it failed, which is then in the log and in the report."""
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
        """Settings, identity, membership. After a failure there is no membership."""
        extra = dict(self.load_config.model_loader_extra_config or {})
        self.report_path = str(extra.pop("report_path", ""))
        self.settings = load_settings(extra)
        if self.settings.model_uri:
            self.uri = UriPlace(self.settings.model_uri)
            self.on_end(self.uri.close)
        self.report.layout = self.kind
        self.report.rank = worker_rank(self.vllm_config)
        if self.settings.server_address is None:
            self.alone = "no server is set"
            self.report.fallbacks.append("joining: no server is set")
            _log.warning(
                "no ModelExpress server is set: loading from storage, alone; "
                "set MODEL_EXPRESS_URL=host:port to take weights from other workers and to offer them"
            )
            return
        identity = self.identity(self.attempt("looking at MX_MODEL_URI", self.uri.digest) if self.uri else None)
        self.any_checkpoint = not identity.extra_parameters["checkpoint"]
        membership = Membership(self.settings, identity, self.report.rank, compat.accelerator())
        try:
            if not membership.join():
                self.cannot_receive = f"no answer from the server at {self.settings.server_address}"
                self.report.fallbacks.append(f"joining: {self.cannot_receive}")
        except BaseException:
            membership.close()
            raise
        self.membership = membership

    @property
    def kind(self) -> Kind:
        """Which weights are exchanged."""
        if self.settings.layout != "auto":
            return self.settings.layout
        return "processed" if compat.processed_weights_can_move() else "raw"

    def identity(self, digest: str | None = None) -> p2p_pb2.SourceIdentity:
        """What this worker's weights are: by the checkpoint's digest, or else by the engine's files, as they are."""
        checkpoint = find_checkpoint(self.model_config.model, self.model_config.revision, self.load_config.download_dir)
        return source_identity(
            self.vllm_config, self.model_config, self.kind, checkpoint, self.settings.model_revision, digest
        )

    def on_end(self, function: Callable[[], None]) -> None:
        """To be called when the rungs are through, in reverse order."""
        self._at_end.callback(function)

    def collecting(self, weights: Weights) -> Callable[[nn.Module], None]:
        """For loaders from storage: looks at a model right after its weights were read, if they can be offered."""

        def loaded(model: nn.Module) -> None:
            if self.membership is not None:
                self.attempt(f"collecting {self.kind} weights", lambda: weights.loaded(model))

        return loaded

    def tell_stored(self, path: StoredPath, weights: Weights, model: nn.Module, seconds: float) -> None:
        """A load from storage has succeeded."""
        self.report.path = path
        self.report.seconds = round(seconds, 6)
        if self.membership is None:
            return
        self.attempt(f"collecting {self.kind} weights", lambda: self.keep(weights, model))
        self.report.tensors = len(weights.found.tensors)
        self.report.bytes = weights.layout.total_bytes if weights.layout else 0

    def keep(self, weights: Weights, model: nn.Module) -> None:
        """The model's weights may be offered. Raises LayoutUnsupported when these cannot be."""
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
        """The membership to serve in: another one when what was loaded is not what this worker joined with."""
        if self.received is not None:
            return membership
        known = membership.identity.extra_parameters["checkpoint"]
        if self.checkpoint_digest == known or (self.checkpoint_digest is None and known and self.uri is None):
            return membership
        identity = self.identity(self.checkpoint_digest)
        if identity == membership.identity:
            return membership
        self.membership = Membership(self.settings, identity, self.report.rank, compat.accelerator())
        self.membership.take_over_turn(membership)
        membership.close()
        self.membership.join()
        return self.membership

    def write_report(self) -> None:
        if self.report_path:
            self.report.write(self.report_path)

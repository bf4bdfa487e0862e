"""One load: identity → membership → the ladder of places that weights come from → serve.

The engine never ends because of us: what our part raises becomes a line in the log and in the report, and the next
rung does the load, into a model built anew; the last one is vLLM's own default loader. Only what that raises reaches
the engine, and LoadPathsExhausted if MX_LOAD_PATHS leaves that loader out.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, TypeVar

from torch import nn
from vllm.config import LoadConfig, ModelConfig, VllmConfig
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from mxcore.errors import LayoutUnsupported, LoadPathsExhausted, NoSource
from mxcore.load_ladder import Ladder, Step
from mxcore.settings import load_settings
from mxcore.storage.plan.progress import Progress
from mxcore.transfer.member.membership import Membership
from mxcore.transfer.receive.load_progress import LoadPath
from mxcore.transfer.receive.receiver import ReceiveReport
from mxserver.wire.errors import MxError
from mxserver.wire.proto import p2p_pb2
from vllm_plugin import compat, serving
from vllm_plugin.checkpoint import find_checkpoint
from vllm_plugin.identity import source_identity, worker_rank
from vllm_plugin.last_will import Record
from vllm_plugin.offer import Offer
from vllm_plugin.report import LoadReport, StoredPath
from vllm_plugin.roles import MX_SOURCE, Wait, ranks_wanted, role_of, wait_for_ranks
from vllm_plugin.target_rung import rungs_of
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
        self.role = role_of(load_config.load_format)
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
        self.received_weights: Weights | None = None
        self.received_checkpoint = ""  # what the sources said that it is
        self.kept: dict[Kind, Weights] = {}  # what can be offered
        self.uri: UriPlace | None = None
        self.checkpoint_digest: str | None = None  # of what was loaded; None: of the engine's own files
        self._joined_digest: str | None = None  # of what is at MX_MODEL_URI
        self._raw: Membership | None = None
        self._at_end = ExitStack()

    def run(self) -> nn.Module:
        started = time.monotonic()
        restore = compat.building_state(self.vllm_config)
        with self.step("join"):
            self.attempt("joining", self.join)
        ladder = Ladder(rungs_of(self), restore=restore, failed=self.note)
        try:
            model = ladder.climb()
        except BaseException as error:
            if self.membership is not None:
                self.membership.close()
            if isinstance(error, LoadPathsExhausted) and not self.role.reads_storage:
                raise NoSource(self.no_source(ladder.steps)) from None
            raise
        finally:
            self.report.paths = [step.as_json() for step in ladder.steps]
            self.attempt("closing what was read from", self._at_end.close)
        with self.step("offer"):
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

    def build(self, loader: BaseModelLoader) -> nn.Module:
        """vLLM's `load_model` with this loader; the report has the seconds of its steps. Raises what that raises."""
        times = [time.monotonic()]
        fill = loader.load_weights

        def timed(*args: Any, **kwargs: Any) -> None:
            times.append(time.monotonic())
            fill(*args, **kwargs)
            times.append(time.monotonic())

        loader.load_weights = timed
        model = compat.load_model(loader, self.vllm_config, self.model_config, self.prefix)
        times.append(time.monotonic())
        for step, began, ended in zip(("build", "fill", "process"), times, times[1:], strict=False):
            self.report.steps[step] = round(ended - began, 6)
        return model

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Around a step of ours, whose seconds are added to the report's."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.report.steps[name] = round(self.report.steps.get(name, 0.0) + time.monotonic() - began, 6)

    def what(self) -> str:
        """What is loaded, for messages."""
        name = self.membership.identity.model_name if self.membership is not None else self.model_config.model
        return f"{self.kind} weights of {name}, rank {self.report.rank}"

    def no_source(self, steps: Sequence[Step]) -> str:
        """The message of a target that got nothing."""
        reason = steps[-1].reason if steps else "nothing was tried"
        return (
            f"{self.role.load_format} has no {self.what()}: {reason}. Start a worker with --load-format mx-source, or "
            "one with mx and MX_SOURCE_KEEP=raw; --load-format mx goes to storage when there is none"
        )

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
        self.settings = load_settings(extra, refused=self.report.fallbacks)
        if self.settings.model_uri and self.role.reads_storage:
            self.uri = UriPlace(self.settings.model_uri, self.settings)
            self.on_end(self.uri.close)
        self.report.layout = self.kind
        self.report.rank = worker_rank(self.vllm_config, self.model_config)
        if self.settings.server_address is None:
            self.alone = "no server is set"
            self.report.fallbacks.append("joining: no server is set")
            _log.warning(
                "no ModelExpress server is set: loading from storage, alone; "
                "set MODEL_EXPRESS_URL=host:port to take weights from other workers and to offer them"
            )
            return
        if self.uri is not None:
            self._joined_digest = self.attempt("looking at MX_MODEL_URI", self.uri.digest)
        identity = self.identity(self.kind, self._joined_digest)
        self.any_checkpoint = not identity.extra_parameters["checkpoint"]
        membership = self.new_membership(identity)
        try:
            late = self.role is MX_SOURCE and self.settings.sync_publish  # published when it is loaded
            if not late and not membership.join():
                self.report.fallbacks.append(f"joining: {self._unheard(membership)}")
        except BaseException:
            membership.close()
            raise
        self.membership = membership

    def _unheard(self, membership: Membership) -> str:
        """What came of joining without success: whoever can at least be asked for sources may take weights."""
        address = self.settings.server_address
        try:
            membership.published_ranks(ready=True)
        except MxError:
            reason = f"no answer from the server at {address}"
            self.cannot_receive = reason if self.role.reads_storage else ""
            return reason
        return f"the server at {address} does not take this worker's record"

    def new_membership(self, identity: p2p_pb2.SourceIdentity) -> Membership:
        """This worker at the server, not joined yet."""
        return Membership(self.settings, identity, self.report.rank, compat.accelerator())

    def raw_membership(self) -> Membership | None:
        """By which sources of raw weights are found and read, by a worker that exchanges processed ones."""
        if self._raw is None and self.membership is not None:
            self._raw = self.new_membership(self.identity("raw", self._joined_digest))
            self.on_end(self._raw.close)
        return self._raw

    @property
    def kind(self) -> Kind:
        """Which weights are exchanged."""
        if self.role.is_fixed:
            return "raw"
        if self.settings.layout != "auto":
            return self.settings.layout
        return "processed" if compat.processed_weights_can_move() else "raw"

    @property
    def kept_kinds(self) -> tuple[Kind, ...]:
        """Which weights are offered."""
        if not self.role.offers:
            return ()
        keep = self.settings.source_keep
        if keep == "both":
            return ("processed", "raw")
        return (self.kind if keep is None else keep,)

    def identity(self, kind: Kind, digest: str | None = None) -> p2p_pb2.SourceIdentity:
        """What this worker's weights are: by the checkpoint's digest, or else by the engine's files, as they are."""
        checkpoint = find_checkpoint(self.model_config.model, self.model_config.revision, self.load_config.download_dir)
        made = source_identity(
            self.vllm_config, self.model_config, kind, checkpoint, self.settings.model_revision, digest
        )
        named = self.settings.model_name if self.role.is_fixed else ""
        made.model_name = named or self.settings.model_name_override or made.model_name
        return made

    def on_end(self, function: Callable[[], None]) -> None:
        """To be called when the rungs are through, in reverse order."""
        self._at_end.callback(function)

    def tell_stored(self, path: StoredPath, model: nn.Module, seconds: float, size_bytes: int = 0) -> None:
        """A load from storage has succeeded; `size_bytes` of its checkpoint, where nothing else tells them."""
        self.report.path = path
        self.report.seconds = round(seconds, 6)
        self.report.bytes = size_bytes
        with self.step("keep"):
            self.keep(model)

    def filled(self, model: nn.Module, given: Weights | None = None) -> None:
        """Before processing: looks at what is to be kept. `given` are weights that were received."""
        for kind in self.kept_kinds if self.membership is not None else ():
            if given is not None and given.kind == kind:
                self.kept[kind] = given
            elif kind == "raw" and given is not None:
                self.report.fallbacks.append("keeping raw weights: this worker received processed ones")
            else:
                weights = Weights(kind, self.device)
                if self.attempt(f"collecting {kind} weights", partial(self._seen, weights, model)):
                    self.kept[kind] = weights

    def keep(self, model: nn.Module) -> None:
        """After processing: what can be offered is complete, or left out."""
        for kind, weights in list(self.kept.items()):
            if weights is self.received_weights and kind == "processed":
                continue
            if not self.attempt(f"collecting {kind} weights", partial(self._complete, weights, model)):
                del self.kept[kind]
        if self.received is None and self.kept:
            shown = next(iter(self.kept.values()))
            self.report.tensors = len(shown.found.tensors)
            self.report.bytes = shown.layout.total_bytes if shown.layout else 0

    def _seen(self, weights: Weights, model: nn.Module) -> bool:
        weights.loaded(model)
        return True

    def _complete(self, weights: Weights, model: nn.Module) -> bool:
        weights.processed(model)
        if weights.kind == "raw":
            beside = weights.bytes_beside(model)
            _log.info("raw weights are kept for other workers: %d bytes beside the model (MX_SOURCE_KEEP)", beside)
        return True

    def forget_model(self) -> None:
        """A model is given up: nothing of it may be offered or told."""
        self.kept.clear()
        self.received = self.received_weights = None
        self.received_checkpoint = ""
        self.report.forget()

    def serve(self) -> None:
        """Offers what this worker has; leaves when there is nothing, or nothing that may be offered."""
        membership = self.membership
        if membership is None:
            return
        try:
            if not self.kept:
                return
            if reason := compat.may_lose_memory(self.vllm_config, self.model_config):
                raise LayoutUnsupported(f"in {reason} weights can vanish while they are read: not offered")
            for weights in self.kept.values():
                self.attempt(f"offering {weights.kind} weights", partial(self.offer, weights))
        finally:
            if self.membership is not None and self.membership.holder is None:
                self.membership.close()

    def offer(self, weights: Weights) -> None:
        """Serves weights of one kind, until the engine ends. Raises what Membership.serve raises."""
        if weights.layout is None or weights.placement is None or self.membership is None:
            return
        ours = weights.kind == self.kind
        membership = (
            self.under_own_name(self.membership)
            if ours
            else self.new_membership(self.identity(weights.kind, self.loaded_digest))
        )
        digests = self.received.digests if self.received is not None and weights is self.received_weights else None
        offer = Offer(membership, weights.layout, weights.placement, weights.found.scalars, keep_alive=weights)
        try:
            if self.role is MX_SOURCE and self.settings.sync_publish:
                membership.join()
                self.wait_for_siblings(membership)
            offer.start(digests)
        except BaseException:
            membership.close()
            raise
        self.report.tell_offer(weights.kind, membership.source_id, membership.worker_id)
        compat.watch_worker(self.vllm_config, serving.EngineWatch())
        address = self.settings.server_address or ""
        record = Record(address, membership.source_id, membership.worker_id, membership.worker_rank)
        serving.stay(offer, record, compat.engine_of(self.vllm_config))

    def wait_for_siblings(self, membership: Membership) -> None:
        """MX_SYNC_PUBLISH: until all ranks of this source have loaded and said so, in bounded time."""
        wanted = ranks_wanted(self)
        wait = Wait(f"all {wanted} ranks of this source", self.settings.source_wait_seconds)
        if not wait_for_ranks(membership, wait, wanted, ready=False):
            _log.warning(
                "not all %d ranks of this source were published within %g s: this one is offered all the same",
                wanted,
                wait.limit_seconds,
            )

    @property
    def loaded_digest(self) -> str | None:
        """Of the checkpoint that was loaded; None: that of the engine's own files."""
        return self.received_checkpoint if self.received is not None else self.checkpoint_digest

    def under_own_name(self, membership: Membership) -> Membership:
        """The membership to serve in: another one when what was loaded is not what this worker joined with."""
        known = membership.identity.extra_parameters["checkpoint"]
        loaded = self.loaded_digest
        if loaded == known or (loaded is None and known and self.uri is None):
            return membership
        identity = self.identity(self.kind, loaded)
        if identity == membership.identity:
            return membership
        self.membership = self.new_membership(identity)
        self.membership.take_over_turn(membership)
        membership.close()
        return self.membership

    def write_report(self) -> None:
        if self.report_path:
            self.report.write(self.report_path)

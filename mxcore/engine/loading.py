"""One load: identity → membership → the ladder of places that weights come from → serve.

The engine never ends because of us: what our part raises becomes a line in the log and in the report, and the next
rung does the load, into a model built anew; the last one is the engine's own loader. Only what that raises reaches the
engine, LoadPathsExhausted if MX_LOAD_PATHS leaves that loader out, and SignatureError where MX_MODEL_SIGNATURE=require.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace

from torch import nn

from mxcore.agreement import LEAST_STALL_SECONDS, Agreement, Gather
from mxcore.cuda import driver as cuda_driver
from mxcore.engine import serving
from mxcore.engine.context import LoadContext, Role
from mxcore.engine.departure import Record
from mxcore.engine.loaded import Loaded
from mxcore.engine.model_files import UriPlace
from mxcore.engine.protocol import Engine, Fill
from mxcore.engine.report import Fallbacks, LoadReport, StepSeconds
from mxcore.engine.rungs import Wait, rungs_of, wait_for_ranks
from mxcore.engine.signed_model import signed_manifest
from mxcore.engine.weights import Constructed, Weights
from mxcore.errors import LayoutUnsupported, LoadPathsExhausted, NoSource
from mxcore.load_ladder import Ladder, Rung
from mxcore.metrics import LOAD_SECONDS, LOADS, PHASE_SECONDS, RECEIVED_BYTES
from mxcore.metrics import start as start_metrics
from mxcore.settings import WorkerSettings, load_settings
from mxcore.storage.signed import SignedManifest
from mxcore.transfer.member import CHECKPOINT_PARAMETER, Membership, Refusal
from mxcore.transfer.route import choose_nic, pin_nic
from mxcore.transfer.serve import Origin
from mxserver.wire import MxError, SettingError

__all__ = ["load", "load_reported"]

_log = logging.getLogger(__name__)


def load(engine: Engine, role: Role) -> nn.Module:
    """A model that is ready to run. What of it can be offered is served until the engine ends (`serving`).

    Raises what the engine's own loader raises, and LoadPathsExhausted where that is left out; NoSource for a role that
    only pulls.
    """
    return load_reported(engine, role)[0].model


def load_reported(
    engine: Engine,
    role: Role,
    *,
    rungs: Callable[[LoadContext], list[Rung[Loaded]]] = rungs_of,
    check: Fill = lambda model: None,
    keeps_constructed: bool = False,
    constructed: Constructed | None = None,
) -> tuple[Loaded, LoadReport]:
    """As `load`, by other rungs. `check` and what is known of how the model was built are LoadContext's."""
    started = time.monotonic()
    restore = engine.building_state()
    fallbacks, steps = Fallbacks(), StepSeconds()
    context = LoadContext(
        engine,
        role,
        load_settings({}, {}),
        fallbacks,
        ExitStack(),
        check=check,
        keeps_constructed=keeps_constructed,
        constructed=constructed,
    )
    context = replace(context, agreement=_agreement(context))
    context.at_end.callback(context.agreement.close)
    with steps.step("join"):  # after a failure there is what was found before it
        context = _with_settings(context)
        context = replace(context, signed=_signed(context))
        with fallbacks.attempt("joining"):
            context = replace(context, rank=engine.rank())
            context = _with_membership(context)
    context.agreement.stall_seconds = max(LEAST_STALL_SECONDS, context.settings.stall_timeout_seconds)
    ladder = Ladder(
        rungs(context),
        restore=restore,
        failed=lambda step: fallbacks.append(str(step)),
        agreement=context.agreement,
    )
    try:
        loaded = ladder.climb()
    except BaseException as error:
        LOAD_SECONDS.observe(time.monotonic() - started, "none", "error")
        if context.membership is not None:
            context.membership.close()
        if isinstance(error, LoadPathsExhausted) and not role.reads_storage:
            reason = ladder.steps[-1].reason if ladder.steps else "nothing was tried"
            raise NoSource(f"{role.load_format} has no {context.what}: {reason}. {role.otherwise}") from None
        raise
    finally:
        with fallbacks.attempt("closing what was read from"):
            context.at_end.close()
    if context.membership is not None:
        told = loaded.part.steps
        context.membership.loads.took(
            told.get("fill", 0.0), sum(told.get(name, 0.0) for name in ("build", "process", "keep"))
        )
    offers: list[dict[str, str]] = []
    with steps.step("offer"), fallbacks.attempt("serving"):
        offers = _serve(context, loaded)
    report = LoadReport(
        **{**vars(loaded.part), "steps": {"join": steps["join"], **loaded.part.steps, "offer": steps["offer"]}},
        model=engine.model,
        part_of_engine=engine.part,
        rank=context.rank,
        serving=bool(offers),
        source_id=offers[0]["source_id"] if offers else "",
        worker_id=offers[0]["worker_id"] if offers else "",
        offers=offers,
        load_seconds=round(time.monotonic() - started, 3),
        paths=[step.as_json() for step in ladder.steps],
        fallbacks=fallbacks,
        refusals=context.refusal_counts(),
        checkpoint=loaded.checkpoint or "",
    )
    _count(report)
    _log.info("%s", report.line())
    if context.report_path:
        with fallbacks.attempt("writing the report"):
            report.write(context.report_path)
    return loaded, report


def _count(report: LoadReport) -> None:
    """For the metrics. What came of other workers was counted when it came."""
    LOADS.add(report.path)
    LOAD_SECONDS.observe(report.load_seconds, report.path, "success")
    for phase, seconds in report.steps.items():
        PHASE_SECONDS.observe(seconds, phase)
    if report.path != "p2p":
        RECEIVED_BYTES.add(report.path, "none", amount=report.bytes)
    elif report.bytes_from_storage:
        RECEIVED_BYTES.add("storage", "none", amount=report.bytes_from_storage)


def _agreement(context: LoadContext) -> Agreement:
    """With the engine's other processes; where they cannot be found, one that leaves only the last resort."""

    def nobody(message: bytes, timeout_seconds: float) -> list[bytes]:
        raise RuntimeError("the engine's other processes were not found")

    gather: Gather | None = nobody
    with context.fallbacks.attempt("finding the engine's other processes"):
        gather = context.engine.siblings()
    return Agreement(gather)


def _with_settings(context: LoadContext) -> LoadContext:
    options = dict(context.engine.options)
    report_path = str(options.pop("report_path", ""))
    if report_path and context.engine.part:
        report_path += f".{context.engine.part}"
    settings = load_settings(options, refused=context.fallbacks)
    if settings.metrics_enabled and settings.metrics_port is not None:
        with context.fallbacks.attempt("counting for MX_METRICS_PORT"):
            start_metrics(settings.metrics_port)
    if settings.nic_pin and context.engine.device.type == "cuda":
        with context.fallbacks.attempt("choosing a network card (MX_RDMA_NIC_PIN)"):
            _pin_nic(settings, context.engine.device.index or 0)
    uri: UriPlace | None = None
    if settings.model_uri and context.role.reads_storage:
        uri = UriPlace(settings.model_uri)
        context.at_end.callback(uri.close)
    return replace(context, settings=settings, report_path=report_path, uri=uri)


def _pin_nic(settings: WorkerSettings, device_index: int) -> None:
    """Before the first agent is made. Raises CudaError, OSError."""
    address = cuda_driver.Device(device_index).pci_bus_id
    choice = choose_nic(address, settings.nic_pin, least_gbps=settings.nic_pin_least_gbps)
    level = logging.INFO if choice.port else logging.WARNING
    _log.log(level, "device %s uses %s: %s", address, choice.port or "the RDMA ports that UCX chooses", choice.because)
    if choice.port:
        pin_nic(choice.port)


def _signed(context: LoadContext) -> SignedManifest | None:
    """What has to be verified. Raises SignatureError: nothing is loaded then."""
    engine = context.engine
    try:
        return signed_manifest(context.settings, engine.model, engine.revision, engine.download_dir, context.uri)
    except BaseException:
        context.at_end.close()
        raise


def _with_membership(context: LoadContext) -> LoadContext:
    fallbacks = context.fallbacks
    if context.settings.server_address is None:
        fallbacks.append("joining: no server is set")
        _log.warning(
            "no ModelExpress server is set: loading from storage, alone; "
            "set MODEL_EXPRESS_URL=host:port to take weights from other workers and to offer them"
        )
        return replace(context, alone="no server is set")
    digest: str | None = None
    if context.uri is not None:
        with fallbacks.attempt("looking at MX_MODEL_URI"):
            digest = context.uri.digest
    identity = context.identity(context.kind, digest)
    membership = context.new_membership(identity)
    cannot_receive = ""
    try:
        if not _publishes_late(context) and not membership.join():
            reason, is_there = _unheard(membership)
            fallbacks.append(f"joining: {reason}")
            cannot_receive = "" if is_there or not context.role.reads_storage else reason
    except BaseException:
        membership.close()
        raise
    return replace(
        context,
        membership=membership,
        uri_digest=digest,
        cannot_receive=cannot_receive,
        any_checkpoint=not identity.extra_parameters[CHECKPOINT_PARAMETER],
    )


def _publishes_late(context: LoadContext) -> bool:
    """MX_SYNC_PUBLISH, of a worker that only offers: it is published when it is loaded."""
    return context.settings.sync_publish and not context.role.pulls


def _unheard(membership: Membership) -> tuple[str, bool]:
    """What came of joining without success, and whether there is a server that can at least be asked for sources."""
    address = membership.settings.server_address
    try:
        membership.published_ranks(ready=True)
    except MxError as error:
        if isinstance(error.__cause__, SettingError):  # nobody was called
            return str(error.__cause__), False
        return f"no answer from the server at {address}", False
    return f"the server at {address} does not take this worker's record", True


def _serve(context: LoadContext, loaded: Loaded) -> list[dict[str, str]]:
    """Offers what this worker has; leaves when there is nothing, or nothing that may be offered."""
    membership = context.membership
    offers: list[dict[str, str]] = []
    if membership is None:
        return offers
    try:
        if loaded.kept and (reason := context.engine.loses_memory()):
            why = f"in {reason} weights can vanish while they are read: not offered"
            context.refused("offer", Refusal("offer", "memory_moves", why))
            raise LayoutUnsupported(why)
        for weights in loaded.kept:
            with context.offering(f"offering {weights.kind} weights"):
                offers.append(_offer(context, membership, loaded, weights))
    finally:
        if membership.holder is None:
            membership.close()
    return offers


def _offer(context: LoadContext, joined: Membership, loaded: Loaded, weights: Weights) -> dict[str, str]:
    """Serves weights of one kind, until the engine ends. Raises what Membership.serve raises."""
    if weights.kind == context.kind:
        membership = _under_own_name(context, joined, loaded.checkpoint)
    else:
        membership = context.new_membership(context.identity(weights.kind, loaded.checkpoint))
    offer = serving.Offer(membership, weights)
    try:
        if _publishes_late(context):
            membership.join()
            _wait_for_siblings(context, membership)
        received = weights.received
        offer.start(weights.digests if received is None else received.digests, _origin(loaded, weights))
    except BaseException:
        if membership is not joined:  # that one tells the server why, as it leaves
            membership.close()
        raise
    if weights.kind == context.kind and membership is not joined:
        joined.close()
    context.engine.watch(serving.EngineWatch())
    address = context.settings.server_address or ""
    record = Record(address, membership.source_id, membership.worker_id, membership.worker_rank)
    serving.stay(offer, record, context.engine.instance, context.engine.part)
    told = {"layout": weights.kind, "source_id": membership.source_id, "worker_id": membership.worker_id}
    return told | ({"until": until} if (until := context.engine.offers_until()) else {})


def _origin(loaded: Loaded, weights: Weights) -> Origin | None:
    """Who vouches for these weights: whom they came from, or this worker, which read storage."""
    if weights.received is not None:
        return Origin.received(weights.received.bytes_from)
    if loaded.received_from:
        return Origin.received_raw(loaded.received_from)
    return None if weights.layout is None else Origin.own(weights.layout)


def _wait_for_siblings(context: LoadContext, membership: Membership) -> None:
    """MX_SYNC_PUBLISH: until all ranks of this source have loaded and said so, in bounded time."""
    wanted = context.ranks_wanted
    wait = Wait(f"all {wanted} ranks of this source", context.settings.source_wait_seconds)
    if not wait_for_ranks(membership, wait, wanted, ready=False):
        _log.warning(
            "not all %d ranks of this source were published within %g s: this one is offered all the same",
            wanted,
            wait.limit_seconds,
        )


def _under_own_name(context: LoadContext, joined: Membership, checkpoint: str | None) -> Membership:
    """The membership to serve in: another one when what was loaded is not what this worker joined with.

    `joined` stays until this one serves: the server hears by it if that comes to nothing.
    """
    known = joined.identity.extra_parameters[CHECKPOINT_PARAMETER]
    if checkpoint == known or (checkpoint is None and known and context.uri is None):
        return joined
    identity = context.identity(context.kind, checkpoint)
    if identity == joined.identity:
        return joined
    membership = context.new_membership(identity)
    membership.take_over_election(joined)
    return membership

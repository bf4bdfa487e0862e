"""What each rung of the ladder would do now, without loading (`mx explain`).

What a worker's weights would be called, the engine's plugin says where one is installed (`engine_identities`); then
`p2p` knows who has just these, or in what the nearest source differs. Else it looks for any worker with the model's
name.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from mxcore.cli.explain.engine_identities import engine_identities
from mxcore.load_ladder import reason_of
from mxcore.settings import WorkerSettings
from mxcore.storage.remote import missing_packages, parse_model_uri
from mxcore.transfer.member import CHECKPOINT_PARAMETER, differs_least, equal_but_for_files
from mxserver.wire import SettingError

__all__ = ["Probe", "probe"]

Verdict = Literal["take", "wait", "skip"]


class Probe(NamedTuple):
    """What a rung would do; `wait` is for what depends on others."""

    rung: str
    verdict: Verdict
    reason: str


def probe(rung: str, model: str, settings: WorkerSettings, arguments: Sequence[str] = ()) -> Probe:
    """Probes one rung (a key of RUNGS) for an engine with these arguments.

    An error is a reason to skip; credentials never show in the reason.
    """
    if model and Path(model).is_dir():  # as for the engine: a folder is no name of the hub
        model = os.path.abspath(model)  # noqa: PTH100 - symbolic links are names as well
    try:
        verdict, reason = _PROBES[rung](model, settings, arguments)
    except Exception as error:  # noqa: BLE001 - it is the answer
        verdict, reason = "skip", reason_of(error)
    return Probe(rung, verdict, reason)


def _p2p(model: str, settings: WorkerSettings, arguments: Sequence[str]) -> tuple[Verdict, str]:
    from mxserver.wire.calls import ServerClient
    from mxserver.wire.proto import p2p_pb2

    if settings.server_address is None:
        return "skip", "no server is set (MODEL_EXPRESS_URL)"
    with ServerClient(settings.server_address, timeout_seconds=settings.server_timeout_seconds) as client:
        refs = client.list_sources(model_name=model or None, status=p2p_pb2.SOURCE_STATUS_READY, limit=100)
        if not refs:
            what = f"workers with {model}" if model else "workers"
            return "skip", f"the server at {settings.server_address} knows no {what} that are READY"
        ranks = sorted({ref.worker_rank for ref in refs})
        there = f"{len(refs)} workers are READY (ranks {', '.join(map(str, ranks))})"
        if not model:
            return "take", f"{there}, if their layout is this worker's"
        try:
            identities = engine_identities(model, arguments)
        except SettingError as error:
            return "take", f"{there}, if their layout is this worker's, which is not known: {error}"
        if not identities:
            return "take", f"{there}, if their layout is this worker's (no engine is installed here to tell)"
        for identity in identities:
            if same := client.list_sources(identity, status=p2p_pb2.SOURCE_STATUS_READY, worker_rank=ranks[0]):
                kind = identity.extra_parameters["layout"]
                return "take", f"{len(same)} workers of rank {ranks[0]} have just these weights ({kind}); {there}"
        for identity in identities:  # a worker without weight files takes those that all others have
            if not identity.extra_parameters[CHECKPOINT_PARAMETER] and (
                count := equal_but_for_files(client, identity, ranks[0])
            ):
                kind = identity.extra_parameters["layout"]
                fit = f"{count} workers of rank {ranks[0]} have such weights ({kind})"
                return "take", f"no weight files are here to compare: {fit}, and are taken if their files are equal"
        nearest = [text for each in identities if (text := differs_least(client, each, ranks[0]))]
    return "skip", f"{there}, and none has just these weights: {min(nearest, key=len, default='they have left')}"


def _fleet(model: str, settings: WorkerSettings, _: Sequence[str]) -> tuple[Verdict, str]:
    from mxserver.wire.calls import ServerClient
    from mxserver.wire.proto import p2p_pb2

    if settings.server_address is None:
        return "skip", "no server is set (MODEL_EXPRESS_URL)"
    with ServerClient(settings.server_address, timeout_seconds=settings.server_timeout_seconds) as client:
        refs = client.list_sources(model_name=model or None, status=p2p_pb2.SOURCE_STATUS_INITIALIZING, limit=100)
    if refs:
        return "wait", f"{len(refs)} workers load now: waited for, at most {settings.source_wait_seconds:g} s"
    return "wait", "nobody loads now: of workers that start together one reads storage, and the others wait for it"


def _uri(model: str, settings: WorkerSettings, _: Sequence[str]) -> tuple[Verdict, str]:
    from mxcore.storage.remote import LocalFolder, ObjectFolder, RemoteFolder, open_remote

    if not settings.model_uri:
        return "skip", "MX_MODEL_URI is not set"
    uri = parse_model_uri(settings.model_uri)
    if missing := missing_packages(uri):
        return "skip", f"{uri.text}: {missing}"
    folder: RemoteFolder = LocalFolder(uri.folder) if uri.is_local else ObjectFolder(uri)
    try:
        checkpoint = open_remote(folder)
    finally:
        folder.close()
    return "take", (
        f"{uri.text}: {len(checkpoint)} tensors in {len(checkpoint.files)} files, {checkpoint.total_bytes} bytes"
    )


def _cache(model: str, settings: WorkerSettings, _: Sequence[str]) -> tuple[Verdict, str]:
    from mxcore.storage.remote import has_weights, same_files_here
    from mxserver.wire import ModelNotFound
    from mxserver.wire.files import ModelClient

    if settings.server_address is None:
        return "skip", "no server is set (MODEL_EXPRESS_URL)"
    if not model:
        return "skip", "no MODEL was given to ask the server for"
    if Path(model).is_absolute():
        return "skip", f"{model} is a folder of this machine, and no model that the server could have"
    revision = settings.model_revision or None
    with ModelClient(settings.server_address, timeout_seconds=settings.server_timeout_seconds) as client:
        try:
            listed = client.list_files(model, revision=revision)
        except ModelNotFound:
            listed = None
    over_grpc = settings.no_shared_storage
    if listed is None or not has_weights(listed):
        if over_grpc:
            return "take", f"MODEL_EXPRESS_NO_SHARED_STORAGE=1: the server downloads {model} and streams it"
        return "skip", f"the server's cache does not have the weights of {model}"
    if over_grpc:
        where = "to the disk" if settings.cache_weights else "straight into the model (MX_CACHE_WEIGHTS=0)"
        return "take", f"MODEL_EXPRESS_NO_SHARED_STORAGE=1: {listed.size_bytes} bytes over gRPC, {where}"
    shared, reason = same_files_here(listed)
    return ("take" if shared else "skip"), reason


def _engine(model: str, settings: WorkerSettings, _: Sequence[str]) -> tuple[Verdict, str]:
    if importlib.util.find_spec("vllm") is None:
        return "skip", "vLLM is not installed here"
    if model and Path(model).is_absolute() and not Path(model).is_dir():
        return "skip", f"there is no folder {model}"
    return "take", f"vLLM's default loader, files read by MX_STORAGE_READER={settings.storage_reader}"


_PROBES: dict[str, Callable[[str, WorkerSettings, Sequence[str]], tuple[Verdict, str]]] = {
    "p2p": _p2p,
    "fleet": _fleet,
    "uri": _uri,
    "cache": _cache,
    "engine": _engine,
}

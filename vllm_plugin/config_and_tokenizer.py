"""Configuration and tokenizer before vLLM looks for them: from where the weights will come from.

vLLM reads them long before it asks a loader, when its arguments become a configuration. Nothing here raises: what
cannot be brought is a line in the log, and vLLM says itself what it misses.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mxcore.settings import WorkerSettings, load_settings
from mxcore.storage.remote import (
    OBJECT_SCHEMES,
    LocalFolder,
    ObjectFolder,
    ObjectOptions,
    RemoteFolder,
    hub_cache,
    listing_commit,
    parse_model_uri,
    place_in_hub_cache,
    pull_small_files,
)
from mxserver.wire import MxError
from mxserver.wire.files import ModelClient

__all__ = ["prepare", "prepare_offline"]

_log = logging.getLogger("vllm.modelexpress")


def prepare(arguments: Any) -> None:
    """Looks at vLLM's `EngineArgs` with one of our load formats; changes `model` where it has to be a folder here."""
    if isinstance(arguments.model, str):
        _told(arguments.model, lambda: _prepare(arguments))


def prepare_offline(model: Any, revision: str | None) -> None:
    """Before vLLM looks for a model in the hub's cache alone (HF_HUB_OFFLINE=1)."""
    if isinstance(model, str) and _wants(os.environ):
        _told(model, lambda: _to_hub_cache(load_settings(), model, revision, None))


def _told(model: str, function: Callable[[], None]) -> None:
    try:
        function()
    except (MxError, OSError, ImportError) as error:
        _log.warning("configuration and tokenizer of %s could not be brought here: %s", model, error)
    except Exception:  # noqa: BLE001 - vLLM says itself what it misses; the log has the traceback
        _log.exception("configuration and tokenizer of %s could not be brought here, by a fault of ours", model)


def _wants(environ: Any) -> bool:
    return bool(environ.get("MX_MODEL_URI") or environ.get("MODEL_EXPRESS_NO_SHARED_STORAGE"))


def _prepare(arguments: Any) -> None:
    extra = dict(arguments.model_loader_extra_config or {})
    given = {key: value for key, value in extra.items() if key != "report_path"}
    settings = load_settings(given, told=not _wants(os.environ))  # else the loader warns, in the engine's process
    scheme = arguments.model.partition("://")[0]
    if "://" in arguments.model and scheme in OBJECT_SCHEMES:
        uri = arguments.model
        folder = _mirror(uri, settings)
        for name in ("model", "tokenizer"):
            if getattr(arguments, name, None) in (uri, None):
                setattr(arguments, name, str(folder))
        if arguments.served_model_name is None:
            arguments.served_model_name = [uri]
        if not settings.model_uri:
            arguments.model_loader_extra_config = {**extra, "model_uri": uri}
        return
    _to_hub_cache(settings, arguments.model, arguments.revision, arguments.download_dir)


def _mirror(text: str, settings: WorkerSettings) -> Path:
    """The small files of a URI in a folder of their own."""
    folder = ObjectFolder(parse_model_uri(text), ObjectOptions.of(settings))
    try:
        place = hub_cache() / ".mx-uri" / hashlib.sha256(folder.name.encode()).hexdigest()[:24]
        count = pull_small_files(folder, place)
    finally:
        folder.close()
    _log.info("%d files of %s are in %s", count, folder.name, place)
    return place


def _to_hub_cache(settings: WorkerSettings, model: str, revision: str | None, download_dir: str | None) -> None:
    """Fills the hub's cache with a model that is named as on the hub, unless it is there."""
    if Path(model).exists() or "://" in model or _is_cached(model, revision, download_dir):
        return
    cache = hub_cache(download_dir)
    if settings.model_uri:
        uri = parse_model_uri(settings.model_uri)
        folder: RemoteFolder = (
            LocalFolder(uri.folder) if uri.is_local else ObjectFolder(uri, ObjectOptions.of(settings))
        )
        try:
            commit = listing_commit(folder.files)
            place = place_in_hub_cache(
                cache, model, commit, lambda to: pull_small_files(folder, to), ref=revision or "main"
            )
        finally:
            folder.close()
        _log.info("configuration and tokenizer of %s come from %s: %s", model, uri.text, place)
    elif settings.no_shared_storage and settings.server_address:
        with ModelClient(settings.server_address) as client:
            client.ensure(model, revision=revision, ignore_weights=True)
            place = client.fetch_to_hub_cache(model, cache, revision=revision, ignore_weights=True)
        _log.info("configuration and tokenizer of %s come from %s: %s", model, settings.server_address, place)


def _is_cached(model: str, revision: str | None, download_dir: str | None) -> bool:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(model, "config.json", revision=revision, cache_dir=download_dir)
    return isinstance(found, str)

"""Configuration and tokenizer before vLLM looks for them: from where the weights will come from.

vLLM reads them long before it asks a loader, when its arguments become a configuration. Nothing here raises: what
cannot be brought is a line in the log, and vLLM says itself what it misses.
"""

from __future__ import annotations

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
    RemoteFolder,
    hub_cache,
    listing_commit,
    parse_model_uri,
    place_in_hub_cache,
    place_of_state,
    pull_small_files,
)
from mxserver.wire import MxError
from mxserver.wire.files import ModelClient

__all__ = ["prepare", "prepare_offline"]

_log = logging.getLogger("vllm.modelexpress")


def prepare(arguments: Any) -> None:
    """Looks at vLLM's `EngineArgs` with one of our load formats; changes `model` where it has to be a folder here.

    `draft`, if it has that, is name and revision of a draft in files of its own.
    """
    if isinstance(arguments.model, str):
        _told(arguments.model, lambda: _prepare(arguments))
    if draft := getattr(arguments, "draft", None):
        _told(draft["model"], lambda: _prepare_draft(arguments, **draft))


def prepare_offline(model: Any, revision: str | None) -> None:
    """Before vLLM looks for a model in the hub's cache alone (HF_HUB_OFFLINE=1)."""
    if isinstance(model, str) and _wants(os.environ):
        _told(model, lambda: _to_hub_cache(load_settings(), model, revision, None))


def _told(model: str, function: Callable[[], object]) -> None:
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
        folder = _mirror(uri)
        _use(arguments, uri, folder)
        if not settings.model_uri:
            arguments.model_loader_extra_config = {**extra, "model_uri": uri}
        return
    name = arguments.model
    place = _to_hub_cache(settings, name, arguments.revision, arguments.download_dir)
    if place is not None:
        _log.warning("%s is in the hub's cache as it came from the hub; it is not what MX_MODEL_URI has", name)
        _use(arguments, name, place)


def _prepare_draft(arguments: Any, model: str, revision: str | None) -> None:
    """MX_MODEL_URI is not about it: it comes by its own name."""
    given = {key: value for key, value in (arguments.model_loader_extra_config or {}).items() if key != "report_path"}
    settings = load_settings(given, told=True).model_copy(update={"model_uri": ""})
    _to_hub_cache(settings, model, revision, arguments.download_dir)


def _use(arguments: Any, name: str, folder: Path) -> None:
    """Has vLLM read a folder, and serve the model under its name."""
    for field in ("model", "tokenizer"):
        if getattr(arguments, field, None) in (name, None):
            setattr(arguments, field, str(folder))
    if arguments.served_model_name is None:
        arguments.served_model_name = [name]


def _mirror(text: str) -> Path:
    """The small files of a URI in a folder of their own, another one for each state of the URI."""
    folder = ObjectFolder(parse_model_uri(text))
    try:
        commit = listing_commit(folder.files)
        place = place_of_state(hub_cache(), folder.name, commit, lambda to: pull_small_files(folder, to))
    finally:
        folder.close()
    _log.info("configuration and tokenizer of %s are in %s", folder.name, place)
    return place


def _to_hub_cache(settings: WorkerSettings, model: str, revision: str | None, download_dir: str | None) -> Path | None:
    """Fills the hub's cache with a model that is named as on the hub, from where its weights will come.

    What is cached already may be of an older state of that place: old configuration must not meet new weights. Returns
    the folder, where the name itself stands for another one: of a commit that came from the hub.
    """
    if Path(model).exists() or "://" in model:
        return None
    cache = hub_cache(download_dir)
    if settings.model_uri:
        uri = parse_model_uri(settings.model_uri)
        folder: RemoteFolder = LocalFolder(uri.folder) if uri.is_local else ObjectFolder(uri)
        try:
            commit = listing_commit(folder.files)
            place = place_in_hub_cache(
                cache, model, commit, lambda to: pull_small_files(folder, to), ref=revision or "main"
            )
        finally:
            folder.close()
        _log.info("configuration and tokenizer of %s come from %s: %s", model, uri.text, place)
        return None if _cached_folder(model, revision, download_dir) == place else place
    if settings.no_shared_storage and settings.server_address:
        with ModelClient(settings.server_address) as client:
            first = client.ensure(model, revision=revision, ignore_weights=True) or revision
            place = client.fetch_to_hub_cache(model, cache, revision=first, ref=revision or "main", ignore_weights=True)
        _log.info("configuration and tokenizer of %s come from %s: %s", model, settings.server_address, place)
    return None


def _cached_folder(model: str, revision: str | None, download_dir: str | None) -> Path | None:
    """Where vLLM will look for the name."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(model, "config.json", revision=revision, cache_dir=download_dir)
    return Path(found).parent if isinstance(found, str) else None

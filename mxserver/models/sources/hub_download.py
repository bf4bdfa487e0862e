"""Models of the Hugging Face Hub, or of what HF_ENDPOINT names, by `huggingface_hub`.

HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE, time-outs and the rest are that library's own environment names. A revision is
pinned to its commit before the first file is fetched.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

from mxserver import __version__
from mxserver.models.cache_layout import CacheLayout
from mxserver.models.completeness import hubs_list
from mxserver.models.errors import DownloadFailed, DownloadInterrupted, RevisionNotFound
from mxserver.models.names import ModelKey, ModelName, is_commit
from mxserver.models.sources.source import RemoteFile, RemoteModel, is_disk_full

_LOG = logging.getLogger(__name__)

_RETRIED_STATUSES = (408, 429, 500, 502, 503, 504)

_RESOLVE_SECONDS = 60.0  # the library would wait for ever for this one answer

_IMPORT_LOCK = threading.Lock()


def _hub() -> Any:
    """The library, imported at first use: importing takes a second, and reads the library's environment."""
    with _IMPORT_LOCK:
        try:
            import huggingface_hub
            import huggingface_hub.constants
            import huggingface_hub.errors
            import huggingface_hub.utils
        except ImportError as error:
            raise DownloadFailed(
                f"huggingface_hub cannot be imported ({error}); install it with: pip install huggingface_hub"
            ) from error
        for name in ("httpx", "httpx2"):  # a line a request, with the address of every file
            logging.getLogger(name).setLevel(logging.WARNING)
        if "HF_HUB_DISABLE_PROGRESS_BARS" not in os.environ:
            huggingface_hub.utils.disable_progress_bars()  # type: ignore[attr-defined] # it is documented
        if "HF_HUB_DISABLE_XET" not in os.environ:
            # Progress and limits count a file's bytes on disk, but Xet keeps a cache of
            # chunks elsewhere. So Xet must be switched on.
            huggingface_hub.constants.HF_HUB_DISABLE_XET = True
        return huggingface_hub


def _endpoint() -> str | None:
    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or None  # None: the hub itself


class HubSource:
    """The Hub. Offline, it serves what is in the cache folder."""

    parallel_files = 4

    def __init__(self, layout: CacheLayout) -> None:
        self._layout = layout

    def resolve(self, model: ModelName, revision: str) -> RemoteModel:
        hub = _hub()
        if hub.constants.HF_HUB_OFFLINE:
            return self._offline(model, revision)
        api = hub.HfApi(endpoint=_endpoint(), library_name="mx-modelexpress", library_version=__version__)
        try:
            info = api.model_info(model.name, revision=revision, files_metadata=True, timeout=_RESOLVE_SECONDS)
        except Exception as error:
            raise _as_model_error(f"{model.name}@{revision}", error) from error
        if not is_commit(info.sha or ""):
            raise DownloadFailed(f"{model.name}@{revision}: the hub names no commit, but {info.sha!r}")
        return RemoteModel.of(ModelKey(model, info.sha), map(_remote_file, info.siblings or ()))

    def fetch(self, remote: RemoteModel, file: RemoteFile, scratch: Path, stopping: threading.Event) -> Path:
        model, commit = remote.key
        try:
            name = _hub().hf_hub_download(
                model.name,
                file.path,
                revision=commit,
                cache_dir=scratch / "hub",
                endpoint=_endpoint(),
                library_name="mx-modelexpress",
                library_version=__version__,
            )
            found = Path(os.path.realpath(name, strict=True))
        except Exception as error:
            if _comes_from_xet(error):
                # The hub serves the same file over HTTP.
                _hub().constants.HF_HUB_DISABLE_XET = True
                _LOG.warning("Xet failed, files come over HTTP from now on reason=%s", error)
                raise DownloadInterrupted(f"{model.name}@{commit}: {file.path}: Xet failed: {error}") from error
            raise _as_model_error(f"{model.name}@{commit}: {file.path}", error) from error
        if not found.is_relative_to(os.path.realpath(scratch)):
            raise DownloadFailed(f"{model.name}: {file.path} was put into {found}, outside of the download's folder")
        return found

    def _offline(self, model: ModelName, revision: str) -> RemoteModel:
        """With HF_HUB_OFFLINE=1, the files in the cache folder are the model, whoever put them there.

        What else belongs to it: what the hub's library noted of the hub's list, and names whose files are gone.
        """
        commit = revision if is_commit(revision) else self._layout.read_ref(model, revision)
        snapshot = self._layout.snapshot(ModelKey(model, commit)) if commit and is_commit(commit) else None
        if commit is None or snapshot is None or not snapshot.is_dir():
            raise DownloadFailed(f"{model.name}@{revision} is not in the cache folder, and HF_HUB_OFFLINE is set")
        key = ModelKey(model, commit)
        paths = [path for path in sorted(snapshot.rglob("*")) if not path.is_dir()]
        files = tuple(_found_file(path, str(path.relative_to(snapshot))) for path in paths if path.is_file())
        listed = hubs_list(self._layout.model_folder(model), commit)
        if listed is None and len(files) < len(paths):
            listed = tuple(str(path.relative_to(snapshot)) for path in paths)
        return RemoteModel(key, files, listed, "HF_HUB_OFFLINE is set: ask once without it, or copy them there")


def _found_file(path: Path, name: str) -> RemoteFile:
    blob = path.readlink().name if path.is_symlink() else ""
    return RemoteFile(
        name,
        path.stat().st_size,
        sha256=blob if re.fullmatch(r"[0-9a-f]{64}", blob) else "",
        git_sha1=blob if re.fullmatch(r"[0-9a-f]{40}", blob) else "",
    )


def _remote_file(sibling: Any) -> RemoteFile:
    lfs = getattr(sibling, "lfs", None)
    sha256 = (lfs.get("sha256") if isinstance(lfs, dict) else getattr(lfs, "sha256", None)) or ""
    git_sha1 = "" if sha256 else getattr(sibling, "blob_id", None) or ""
    size = getattr(sibling, "size", None)
    return RemoteFile(
        sibling.rfilename,
        size if isinstance(size, int) and size >= 0 else None,
        sha256=sha256 if re.fullmatch(r"[0-9a-f]{64}", sha256) else "",
        git_sha1=git_sha1 if re.fullmatch(r"[0-9a-f]{40}", git_sha1) else "",
    )


def _as_model_error(what: str, error: Exception) -> DownloadFailed | RevisionNotFound:
    """Our error for one of the library's. Programming errors pass unchanged."""
    from huggingface_hub import errors

    chain = list(_causes(error))
    text = " ".join(str(error).split())[:500]
    if is_disk_full(error):
        return DownloadInterrupted(f"{what}: no space left on the disk")
    if any(isinstance(cause, errors.GatedRepoError) for cause in chain):
        return DownloadFailed(f"{what} is gated; set HF_TOKEN to a token of somebody who may read it ({text})")
    if any(isinstance(cause, errors.RevisionNotFoundError | errors.RepositoryNotFoundError) for cause in chain):
        return RevisionNotFound(f"{what} is not known to the hub, or HF_TOKEN may not see it ({text})")
    if any(isinstance(cause, errors.FileMetadataError) for cause in chain):
        return DownloadFailed(f"{what}: the address in HF_ENDPOINT does not answer like a hub ({text})")
    if any(isinstance(cause, errors.OfflineModeIsEnabled) for cause in chain):
        return DownloadFailed(f"{what}: HF_HUB_OFFLINE is set")
    for cause in chain:
        response = getattr(cause, "response", None)
        status = getattr(response, "status_code", None)
        if status in _RETRIED_STATUSES:
            return DownloadInterrupted(f"{what}: the hub answered {status}", retry_after_seconds=_retry_after(response))
        if isinstance(status, int):
            return DownloadFailed(f"{what}: the hub answered {status} ({text})")
    if any(isinstance(cause, (OSError, *_network_errors())) for cause in chain):
        return DownloadInterrupted(f"{what}: {type(error).__name__}: {text}")
    raise error


def _comes_from_xet(error: Exception) -> bool:
    """Whether `hf_xet` did the download; its errors have no class of their own."""
    frames = (frame for cause in _causes(error) for frame, _ in traceback.walk_tb(cause.__traceback__))
    return not is_disk_full(error) and any(frame.f_code.co_name == "xet_get" for frame in frames)


def _causes(error: BaseException | None) -> Any:
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _network_errors() -> tuple[type[BaseException], ...]:
    """The base errors of whichever HTTP library this version of huggingface_hub uses."""
    found = (
        getattr(sys.modules.get(module), name, None)
        for module, name in (("httpx2", "HTTPError"), ("httpx", "HTTPError"), ("requests", "RequestException"))
    )
    return tuple(kind for kind in found if kind is not None)


def _retry_after(response: Any) -> float:
    """How long the hub asks to wait, in seconds; 0 where it does not say.

    By Retry-After (RFC 9110, 10.2.3; not the form with a date), or by RateLimit (draft-ietf-httpapi-ratelimit-headers),
    which is what the hub sends: the time until its window of 300 s ends.
    """
    text = str(response.headers.get("Retry-After", ""))
    if text.isascii() and text.isdigit() and len(text) < 6:
        return float(text)
    parse = getattr(_hub().utils, "parse_ratelimit_headers", None)  # huggingface_hub 1.2 and later
    limit = parse(response.headers) if parse is not None else None
    return float(limit.reset_in_seconds) if limit is not None and limit.remaining == 0 else 0.0

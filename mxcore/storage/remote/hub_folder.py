"""Files brought from elsewhere, where the Hugging Face Hub's library finds them: HF_HUB_OFFLINE=1 works with them."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from mxcore.storage.remote.remote_folder import RemoteFile
from mxserver.wire import SettingError, path_problem, unique_beside

__all__ = ["hub_cache", "listing_commit", "place_in_hub_cache"]


def hub_cache(download_dir: str | None = None) -> Path:
    """The folder that the hub's library, and with it the engine, looks into."""
    if download_dir:
        return Path(download_dir)
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def listing_commit(files: Sequence[RemoteFile]) -> str:
    """A commit for a state of a folder that has none: 40 hex digits, others as soon as one file is another."""
    return hashlib.sha256("\n".join(map(repr, files)).encode()).hexdigest()[:40]


def place_in_hub_cache(cache: Path, name: str, commit: str, fill: Callable[[Path], object], ref: str = "main") -> Path:
    """Makes the snapshot of `name` at a commit, unless it is there, and lets `ref` stand for it; returns its folder.

    `fill` writes the files into a folder beside; it has its name only when that is done. Raises what `fill` raises,
    OSError, and SettingError for a name that is none of the hub.
    """
    if path_problem(name) or name.count("/") > 1 or path_problem(ref):
        raise SettingError(f"{name!r} (revision {ref!r}) is no name of a model on the hub")
    repository = cache / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / commit
    if not snapshot.is_dir():
        beside = unique_beside(repository / commit)
        beside.mkdir(parents=True)
        try:
            fill(beside)
            snapshot.parent.mkdir(exist_ok=True)
            try:
                beside.rename(snapshot)
            except OSError:
                if not snapshot.is_dir():  # another process was first
                    raise
        finally:
            shutil.rmtree(beside, ignore_errors=True)
    named = repository / "refs" / ref
    named.parent.mkdir(parents=True, exist_ok=True)
    made = unique_beside(named)
    try:
        made.write_text(commit)
        made.replace(named)
    finally:
        made.unlink(missing_ok=True)
    return snapshot

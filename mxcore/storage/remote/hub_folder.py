"""Files brought from elsewhere, where the Hugging Face Hub's library finds them: HF_HUB_OFFLINE=1 works with them."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from mxcore.storage.remote.remote_folder import RemoteFile
from mxserver.wire import SettingError, path_problem, remove_leftovers, unique_beside

__all__ = ["hub_cache", "listing_commit", "place_in_hub_cache", "place_of_state", "state_of"]

_OURS = ".mx-commits"  # in a repository of the hub's cache: a file for each commit that `listing_commit` made
_STATES = ".mx-uri"


def hub_cache(download_dir: str | None = None) -> Path:
    """The folder that the hub's library, and with it the engine, looks into."""
    if download_dir:
        return Path(download_dir)
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def listing_commit(files: Sequence[RemoteFile]) -> str:
    """A commit for a state of a folder that has none: 40 hex digits, others as soon as one file is another."""
    return hashlib.sha256("\n".join(map(repr, files)).encode()).hexdigest()[:40]


def place_of_state(cache: Path, uri: str, commit: str, fill: Callable[[Path], object]) -> Path:
    """A folder with the small files of a URI in one state, made by `fill` unless it is there.

    Another state has another folder: files of one never stand for another's. Raises what `fill` raises, and OSError.
    """
    place = cache / _STATES / hashlib.sha256(uri.encode()).hexdigest()[:24] / commit
    _made_whole(place, place.parent.parent, fill)
    return place


def state_of(folder: Path) -> str:
    """The commit that `listing_commit` gave for the files of this folder; "" for one that others made."""
    is_snapshot = folder.parent.name == "snapshots" and (folder.parent.parent / _OURS / folder.name).exists()
    return folder.name if is_snapshot or folder.parent.parent.name == _STATES else ""


def place_in_hub_cache(cache: Path, name: str, commit: str, fill: Callable[[Path], object], ref: str = "main") -> Path:
    """Makes the snapshot of `name` at a commit of `listing_commit`, unless it is there, and lets `ref` stand for it,
    unless that stands for a commit of the hub's; returns its folder.

    `fill` writes the files into a folder beside; it has its name only when that is done. Raises what `fill` raises,
    OSError, and SettingError for a name that is none of the hub.
    """
    if path_problem(name) or name.count("/") > 1 or path_problem(ref):
        raise SettingError(f"{name!r} (revision {ref!r}) is no name of a model on the hub")
    repository = cache / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / commit
    _made_whole(snapshot, repository, fill)
    ours = repository / _OURS
    ours.mkdir(exist_ok=True)
    (ours / commit).touch()
    named = repository / "refs" / ref
    if not named.exists() or (ours / named.read_text().strip()).exists():
        named.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(named.parent)
        made = unique_beside(named)
        try:
            made.write_text(commit)
            made.replace(named)
        finally:
            made.unlink(missing_ok=True)
    return snapshot


def _made_whole(folder: Path, beside: Path, fill: Callable[[Path], object]) -> None:
    """`beside` is where it is filled; it has its name only once it is whole."""
    remove_leftovers(beside)
    if folder.is_dir():
        return
    made = unique_beside(beside / folder.name)
    made.mkdir(parents=True)
    try:
        fill(made)
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            made.rename(folder)
        except OSError:
            if not folder.is_dir():  # another process was first
                raise
    finally:
        shutil.rmtree(made, ignore_errors=True)

"""A model's files: on this machine, found as engines find them, without downloading anything; or at MX_MODEL_URI."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from mxcore.errors import CheckpointError
from mxcore.storage.checkpoint import checkpoint_digest
from mxcore.storage.remote import (
    LocalFolder,
    ModelUri,
    ObjectFolder,
    RemoteFile,
    parse_model_uri,
    remote_digest,
)
from mxserver.wire import WeightFiles, weight_files_in

__all__ = ["CheckpointFiles", "UriPlace", "find_checkpoint", "model_name"]

_IN_CACHE = re.compile(r"models--(?P<owner>[^/]+?)--(?P<name>[^/]+)/snapshots/(?P<commit>[0-9a-f]{40})/?$")


class CheckpointFiles(NamedTuple):
    """A model's files on this machine. `weight_files` is empty when they are not here, or not all of them.

    `chosen` says by which rule, and what is read beside them.
    """

    folder: Path | None
    weight_files: tuple[Path, ...]
    index_file: Path | None
    commit: str
    chosen: WeightFiles = WeightFiles()

    def digest(self) -> str:
        """What tells the checkpoint apart; empty without weight files. Raises MxError for a malformed one."""
        if self.folder is None or not self.weight_files:
            return ""
        return checkpoint_digest(
            [*self.weight_files, *(self.folder / name for name in self.chosen.of_modules)],
            self.index_file,
            folder=self.folder,
            settings_files=[self.folder / name for name in self.chosen.module_settings],
        )


def find_checkpoint(model: str, revision: str | None = None, download_dir: str | None = None) -> CheckpointFiles:
    """Looks for a checkpoint in the folder `model`, or for the hub's `model` in its cache."""
    folder = Path(model)
    if not folder.is_dir():
        cached = _cached(model, revision, download_dir)
        if cached is None:
            return CheckpointFiles(None, (), None, "")
        folder = cached
    match = _IN_CACHE.search(str(folder))
    commit = match["commit"] if match else ""
    try:
        chosen = weight_files_in(folder)
    except OSError:  # the engine says what is wrong with it
        return CheckpointFiles(folder, (), None, commit)
    index = folder / chosen.index_file if chosen.index_file else None
    return CheckpointFiles(folder, tuple(folder / name for name in chosen.files), index, commit, chosen)


def model_name(model: str) -> str:
    """The hub's name for a folder in its cache, the absolute path of another folder, else what the engine was given.

    Workers find each other by it, so `/models/m`, `/models/m/` and `m` in /models have to be one name.
    """
    if match := _IN_CACHE.search(model):
        return f"{match['owner']}/{match['name']}"
    return os.path.abspath(model) if Path(model).is_dir() else model  # noqa: PTH100 - symbolic links are names as well


def _cached(model: str, revision: str | None, download_dir: str | None) -> Path | None:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, revision=revision, cache_dir=download_dir, local_files_only=True))
    except (OSError, ValueError):  # the hub's errors for "not in the cache" and "no such name" are these
        return None


class UriPlace:
    """What MX_MODEL_URI names, opened at its first use and kept for the load. One thread at a time."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._folder: ObjectFolder | None = None

    @cached_property
    def uri(self) -> ModelUri:
        """Raises SettingError."""
        return parse_model_uri(self._text)

    def objects(self) -> ObjectFolder:
        """The folder in the store; raises ObjectStoreError."""
        if self._folder is None:
            self._folder = ObjectFolder(self.uri)
        return self._folder

    def listed(self) -> Sequence[RemoteFile]:
        """All files there, with what changes when they do; raises StorageError."""
        return LocalFolder(self.uri.folder).files if self.uri.is_local else self.objects().files

    def files(self) -> CheckpointFiles:
        """The files of a local folder; raises CheckpointError where there are no safetensors or not all of them."""
        found = find_checkpoint(str(self.uri.folder))
        if not found.weight_files:
            raise CheckpointError(f"MX_MODEL_URI={self.uri.text}: no complete checkpoint there")
        return found

    @cached_property
    def digest(self) -> str:
        """What tells this checkpoint apart, the same for local files and objects; raises MxError."""
        return self.files().digest() if self.uri.is_local else remote_digest(self.objects())

    def close(self) -> None:
        """Idempotent; it opens again at its next use."""
        folder, self._folder = self._folder, None
        if folder is not None:
            folder.close()

"""A model's files on this machine: found as vLLM would find them, without downloading anything.

Needs neither vLLM nor torch.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

INDEX_FILES = ("model.safetensors.index.json", "consolidated.safetensors.index.json")
WEIGHT_PATTERNS = ("consolidated*.safetensors", "*.safetensors", "*.bin", "*.pt")  # as vLLM's default loader looks
_IN_CACHE = re.compile(r"models--(?P<owner>[^/]+?)--(?P<name>[^/]+)/snapshots/(?P<commit>[0-9a-f]{40})/?$")


class Checkpoint(NamedTuple):
    """A model's files on this machine. `weight_files` is empty when they are not here, or not all of them."""

    folder: Path | None
    weight_files: tuple[Path, ...]
    index_file: Path | None
    commit: str


def find_checkpoint(model: str, revision: str | None = None, download_dir: str | None = None) -> Checkpoint:
    """Looks for a checkpoint in the folder `model`, or for the hub's `model` in its cache."""
    folder = Path(model)
    if not folder.is_dir():
        cached = _cached(model, revision, download_dir)
        if cached is None:
            return Checkpoint(None, (), None, "")
        folder = cached
    match = _IN_CACHE.search(str(folder))
    commit = match["commit"] if match else ""
    index = next((folder / name for name in INDEX_FILES if (folder / name).is_file()), None)
    if index is not None and (listed := _listed(index)) is not None:
        files = tuple(folder / name for name in listed)
        if files and all(file.is_file() for file in files):
            return Checkpoint(folder, files, index, commit)
        return Checkpoint(folder, (), index, commit)
    for pattern in WEIGHT_PATTERNS:
        found = tuple(sorted(folder.glob(pattern)))
        if found:
            return Checkpoint(folder, found, index, commit)
    return Checkpoint(folder, (), None, commit)


def model_name(model: str) -> str:
    """The hub's name for a folder in its cache, the absolute path of another folder, else what the engine was given.

    Workers find each other by it, so `/models/m`, `/models/m/` and `m` in /models have to be one name.
    """
    if match := _IN_CACHE.search(model):
        return f"{match['owner']}/{match['name']}"
    return os.path.abspath(model) if Path(model).is_dir() else model  # noqa: PTH100 - symbolic links are names as well


def _listed(index: Path) -> Sequence[str] | None:
    """The shards that an index names, sorted; None when it is no index (then vLLM says what is wrong with it)."""
    try:
        names = set(json.loads(index.read_bytes())["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return sorted(names) if all(isinstance(name, str) and Path(name).name == name for name in names) else None


def _cached(model: str, revision: str | None, download_dir: str | None) -> Path | None:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, revision=revision, cache_dir=download_dir, local_files_only=True))
    except (OSError, ValueError):  # the hub's errors for "not in the cache" and "no such name" are these
        return None

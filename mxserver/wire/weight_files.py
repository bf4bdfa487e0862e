"""Which files of a folder an engine reads weights from: one answer for readers and digests, here and elsewhere.

As vLLM 0.32's default loader chooses them (docs/explanation/storage.md has the table). Names only: nothing is opened
but an index and modules.json, which the caller reads.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

__all__ = ["INDEX_SUFFIX", "WeightFiles", "says_what_belongs", "weight_files", "weight_files_in"]

INDEX_SUFFIX = ".safetensors.index.json"

_CONSOLIDATED = "consolidated*.safetensors"
_PATTERNS = ("*.safetensors", "*.bin", "*.pt")  # the first one that finds something
_NOT_WEIGHTS = ("training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.pt", "scaler.pt")  # of a training
_MODULES = "modules.json"


def says_what_belongs(path: str) -> bool:
    """Whether a file is one of those that `weight_files` and who checks for completeness may read."""
    return path.endswith(INDEX_SUFFIX) or path == _MODULES


class WeightFiles(NamedTuple):
    """Paths below a folder, with "/", sorted.

    `files` are the checkpoint's. `index_file` lists them, if there is one. `missing` are those that it lists and that
    are not there: then `files` is empty, for a part of a model is no model. `of_modules` are weight files that an
    engine reads while it builds a sentence-transformers model (`2_Dense/model.safetensors`), `module_settings` the
    files that say how these are used.
    """

    files: tuple[str, ...] = ()
    index_file: str | None = None
    missing: tuple[str, ...] = ()
    of_modules: tuple[str, ...] = ()
    module_settings: tuple[str, ...] = ()


def weight_files(names: Collection[str], read: Callable[[str], bytes]) -> WeightFiles:
    """Chooses among `names`, paths below a folder; `read` gives the bytes of one of them, its errors pass through.

    `consolidated*.safetensors` go first, then *.safetensors, *.bin, *.pt of the top folder. Names that begin with a
    dot are none of the model's. An index that is none is as absent: the engine says what is wrong with it.
    """
    there = set(names)
    top = sorted(name for name in there if "/" not in name and not name.startswith("."))
    of_modules, module_settings = _modules(there, read)
    consolidated = [name for name in top if fnmatchcase(name, _CONSOLIDATED)]
    index = f"{'consolidated' if consolidated else 'model'}{INDEX_SUFFIX}"
    listed = _listed(read(index)) if index in there else None
    for pattern in (_CONSOLIDATED, *_PATTERNS):
        found = [name for name in top if fnmatchcase(name, pattern)]
        if not found:
            continue
        if not pattern.endswith(".safetensors"):
            kept = tuple(name for name in found if not name.endswith(_NOT_WEIGHTS))
            return WeightFiles(kept, None, (), of_modules, module_settings)
        if listed is None:
            return WeightFiles(tuple(found), index if index in there else None, (), of_modules, module_settings)
        missing = tuple(name for name in listed if name not in found)
        files = () if missing else tuple(listed)
        return WeightFiles(files, index, missing, of_modules, module_settings)
    return WeightFiles((), index if listed else None, tuple(listed or ()), of_modules, module_settings)


def weight_files_in(folder: Path) -> WeightFiles:
    """`weight_files` of a folder on this machine. Raises OSError."""
    names = {path.name for path in folder.iterdir() if path.is_file()}
    if _MODULES in names:
        names |= {
            path.relative_to(folder).as_posix()
            for sub in folder.iterdir()
            if sub.is_dir() and not sub.name.startswith(".")
            for path in sub.iterdir()
            if path.is_file()
        }
    return weight_files(names, lambda name: (folder / name).read_bytes())


def _listed(data: bytes) -> list[str] | None:
    """The files that an index names, sorted; None when it is no index."""
    try:
        names = set(json.loads(data)["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    are_names = all(isinstance(name, str) and name not in ("", ".", "..") and "/" not in name for name in names)
    return sorted(names) if names and are_names else None


def _modules(there: Collection[str], read: Callable[[str], bytes]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Weight files of the folders that modules.json names, and the settings beside them."""
    if _MODULES not in there:
        return (), ()
    try:
        folders = sorted({str(module["path"]).strip("/") for module in json.loads(read(_MODULES))} - {""})
    except (ValueError, KeyError, TypeError, RecursionError):
        return (), (_MODULES,)
    weights, settings = [], [_MODULES]
    for folder in folders:
        found = [f"{folder}/{name}" for name in ("model.safetensors", "pytorch_model.bin")]
        weights += [name for name in found if name in there]
        settings += [name for name in (f"{folder}/config.json",) if name in there]
    return tuple(weights), tuple(settings)

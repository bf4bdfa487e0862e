"""Files of a model that nobody loads, and that a download leaves out unless it is told otherwise."""

from __future__ import annotations

from collections.abc import Collection
from fnmatch import fnmatchcase

__all__ = ["left_out"]

_COPIES = ("original/*", "metal/*")
_BIN = ".bin"

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")


def left_out(
    names: Collection[str], ignore: Collection[str] | None = None, allow: Collection[str] = ()
) -> frozenset[str]:
    """Which of `names` (paths below the model's folder) are left out.

    `ignore` and `allow` are patterns in which `*` matches slashes too: what fits none of `allow` (if there are any), or
    one of `ignore`. `ignore` None: copies of the weights in other forms, as long as weights remain: original/*,
    metal/*, and *.bin in folders that have safetensors.
    """
    refused = {name for name in names if allow and not _fits(name, allow)}
    if ignore is not None:
        return frozenset(refused | {name for name in names if _fits(name, ignore)})
    folders = {name.rpartition("/")[0] for name in names if name.endswith(".safetensors")}
    copies = {
        name for name in names if _fits(name, _COPIES) or (name.endswith(_BIN) and name.rpartition("/")[0] in folders)
    }
    remain = set(names) - refused - copies
    return frozenset(refused | copies) if any(name.endswith(_WEIGHTS) for name in remain) else frozenset(refused)


def _fits(name: str, patterns: Collection[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)

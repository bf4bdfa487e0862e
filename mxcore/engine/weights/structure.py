"""How a model is made: classes of its objects and what processing decided, as names that are compared between workers.

Kernels keep their weights in the same shapes and put other bytes there. Which kernel it is, its class says; in which
way it works, what processing left in flags, texts, enums, dtypes, integers of modules, and functions.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping

from torch import nn

from mxcore.engine.weights.collect import Collected
from mxcore.errors import LayoutMismatch
from mxcore.transfer.layout import Scalars

__all__ = [
    "FLAG_PREFIX",
    "flags_of",
    "numbers_of",
    "require_same_structure",
    "set_flags",
    "structure_of",
    "structure_rows",
]

FLAG_PREFIX = "loaded: "
"""Of names in a manifest of flags that loading set on the model or a module of it: what of it a checkpoint has
(`has_own_lm_head`, `model.has_separate_mask_embedding`)."""

_DIGEST_PREFIX = "sha256 "
_NAMED = 4


def structure_rows(weights: Collected, flags: Mapping[str, bool] = {}) -> set[str]:
    """What a manifest names without a number.

    Layers alike are one row, so that what differs can be told; a digest has them all.

    `flags` loading has set: they travel, and are left out unless processing changed them.
    """
    rows = [f"{path} is a {kind}" for path, kind in weights.classes.items()]
    rows += [f"{path} = {text}" for path, text in weights.decided.items() if text != str(flags.get(path))]
    rows += [f"{path} is {where}" for path, where in weights.functions.items()]
    whole = hashlib.sha256("\0".join(sorted(rows)).encode()).hexdigest()
    return {*(re.sub(r"\b\d+\b", "*", row) for row in rows), _DIGEST_PREFIX + whole}


def structure_of(manifest: Scalars) -> set[str]:
    """The `structure_rows` of a manifest."""
    return {name for name, value in manifest.items() if value is None}


def numbers_of(manifest: Scalars) -> dict[str, float]:
    """What of a manifest is a weight."""
    return {name: value for name, value in manifest.items() if value is not None and not name.startswith(FLAG_PREFIX)}


def flags_of(manifest: Scalars, model: nn.Module) -> dict[str, bool]:
    """The flags of a manifest. Raises LayoutMismatch with the name of one that is no flag of this model."""
    flags = {
        name.removeprefix(FLAG_PREFIX): bool(value) for name, value in manifest.items() if name.startswith(FLAG_PREFIX)
    }
    modules = dict(model.named_modules())
    for name in flags:
        owner, _, flag = name.rpartition(".")
        if not isinstance(getattr(modules.get(owner), flag, None), bool):
            raise LayoutMismatch(
                f"loading set the flag {name!r} at the holder, which this {type(model).__name__} lacks"
            )
    return flags


def set_flags(flags: Mapping[str, bool], model: nn.Module) -> None:
    """Puts what `flags_of` gave into the model."""
    modules = dict(model.named_modules())
    for name, value in flags.items():
        owner, _, flag = name.rpartition(".")
        setattr(modules[owner], flag, value)


def require_same_structure(theirs: set[str], ours: set[str]) -> None:
    """Raises LayoutMismatch with what differs; both are `structure_rows`."""
    if theirs == ours:
        return
    there = sorted(row for row in theirs - ours if not row.startswith(_DIGEST_PREFIX))
    here = sorted(row for row in ours - theirs if not row.startswith(_DIGEST_PREFIX))
    rows = f"there {there[:_NAMED]}, here {here[:_NAMED]}" if there or here else "the same parts in other layers"
    raise LayoutMismatch(f"the holder's model is made otherwise, of other kernels or by other options: {rows}")

"""How a model is made: classes of its objects and what processing decided, as names that are compared between workers.

Kernels keep their weights in the same shapes and put other bytes there. Which kernel it is, its class says; in which
way it works, what processing left in flags, texts, enums, dtypes, integers of modules, and functions.
"""

from __future__ import annotations

import hashlib
import re

from mxcore.engine.weights.collect import Collected
from mxcore.errors import LayoutMismatch

__all__ = ["STRUCTURE_PREFIX", "require_same_structure", "structure_rows"]

STRUCTURE_PREFIX = "structure: "
"""Of names in a manifest that carry no number."""

_DIGEST_PREFIX = STRUCTURE_PREFIX + "sha256 "
_NAMED = 4


def structure_rows(weights: Collected) -> dict[str, float]:
    """Names without a number. Layers alike are one row, so that what differs can be told; a digest has them all."""
    rows = [f"{path} is a {kind}" for path, kind in weights.classes.items()]
    rows += [f"{path} = {text}" for path, text in weights.decided.items()]
    rows += [f"{path} is {where}" for path, where in weights.functions.items()]
    whole = hashlib.sha256("\0".join(sorted(rows)).encode()).hexdigest()
    short = sorted({re.sub(r"\b\d+\b", "*", row) for row in rows})
    return {**{STRUCTURE_PREFIX + row: 0.0 for row in short}, _DIGEST_PREFIX + whole: 0.0}


def require_same_structure(theirs: set[str], ours: set[str]) -> None:
    """Raises LayoutMismatch with what differs; both are names of `structure_rows`."""
    if theirs == ours:
        return
    there = sorted(row.removeprefix(STRUCTURE_PREFIX) for row in theirs - ours if not row.startswith(_DIGEST_PREFIX))
    here = sorted(row.removeprefix(STRUCTURE_PREFIX) for row in ours - theirs if not row.startswith(_DIGEST_PREFIX))
    rows = f"there {there[:_NAMED]}, here {here[:_NAMED]}" if there or here else "the same parts in other layers"
    raise LayoutMismatch(f"the holder's model is made otherwise, of other kernels or by other options: {rows}")

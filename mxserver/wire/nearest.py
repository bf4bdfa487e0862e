"""The nearest known name, for unknown names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def unknown_key(name: str, known: Iterable[str]) -> str:
    """A message about an unknown name, with the nearest known one."""
    names = sorted(known)
    nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.0)[0]
    return f"{name!r} is no setting; the nearest one is {nearest!r}"

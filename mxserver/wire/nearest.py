"""The nearest right name, for names that are none."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def unknown_key(name: str, known: Iterable[str]) -> str:
    """What is wrong with a name that is not among the known ones, and what was probably meant."""
    names = sorted(known)
    nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.0)[0]
    return f"{name!r} is no setting; the nearest one is {nearest!r}"

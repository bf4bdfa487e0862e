"""The nearest known name, for unknown names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_NEAR = 0.66  # of difflib's ratio: one letter of three, two that are swapped, a word that is shorter


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that was probably meant; None where none is near enough to be believed."""
    return next(iter(difflib.get_close_matches(name, sorted(known), n=1, cutoff=_NEAR)), None)


def unknown_key(name: str, known: Iterable[str]) -> str:
    """A message about an unknown name, with the known one that was probably meant."""
    near = nearest(name, known)
    return f"{name!r} is no setting" + (f"; the nearest one is {near!r}" if near else "")

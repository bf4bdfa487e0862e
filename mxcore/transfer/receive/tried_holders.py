"""Holders that were asked: which of them failed or were full, and when each may be asked again."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable

from mxcore.errors import (
    DigestMismatch,
    LayoutMismatch,
    NixlMissing,
    SourceBusy,
    SourceRefused,
    SourceSlow,
    TransferError,
)

__all__ = ["TriedHolders"]

_BUSY_SECONDS = 0.5  # before a holder that was full is asked again; twice as long each time, unless it says when
_LONGEST_BUSY_SECONDS = 8.0
_AGAIN_SECONDS = 10.0  # before a holder that failed is trusted again
_IDLE_SECONDS = 2.0  # before one that gave nothing
_FOR_GOOD = (DigestMismatch, SourceRefused, LayoutMismatch, NixlMissing)


class TriedHolders:
    """Used by one thread. Moments are monotonic seconds."""

    def __init__(self, chance: random.Random) -> None:
        """`chance` scatters receivers that ask the same holder again."""
        self._chance = chance
        self._not_before: dict[str, float] = {}
        self._busy: dict[str, int] = {}  # how often a holder was full, since it gave something
        self._failed: set[str] = set()  # when last asked, and not because they were slow or full
        self.failed_at = 0.0  # when one was last found to have failed

    def may_be_asked(self, name: str, now: float) -> bool:
        """Whether it is time to ask this one (again)."""
        return self._not_before.get(name, 0.0) <= now

    def asked(self, name: str) -> None:
        """It is asked (again): whatever it did before."""
        self._failed.discard(name)

    def gave(self, name: str) -> None:
        """It took this reader: it is not full any more."""
        self._busy.pop(name, None)

    def ended(self, name: str, now: float) -> None:
        """It ended without a failure."""
        self._not_before[name] = now + _IDLE_SECONDS

    def full(self, name: str, error: SourceBusy, now: float) -> float:
        """It was full; returns when it is asked again: as it says, or later each time."""
        times = self._busy[name] = self._busy.get(name, 0) + 1
        least = error.again_seconds or min(_BUSY_SECONDS * 2 ** min(times - 1, 10), _LONGEST_BUSY_SECONDS)
        self._not_before[name] = now + least * (0.75 + 0.5 * self._chance.random())
        return self._not_before[name]

    def failed(self, name: str, error: TransferError, now: float, *, may_find: bool) -> None:
        """It failed: for good, or for a while where the server may list it again (`may_find`)."""
        self.failed_at = now
        if not isinstance(error, SourceSlow):
            self._failed.add(name)
        for_good = isinstance(error, _FOR_GOOD) or not (may_find or isinstance(error, SourceSlow))
        self._not_before[name] = math.inf if for_good else now + _AGAIN_SECONDS

    def all_failed(self, names: Iterable[str]) -> bool:
        """Whether each of these failed when it was last asked."""
        return self._failed.issuperset(names)

    def all_failed_for_good(self, names: Iterable[str]) -> bool:
        """Whether none of these is ever asked again."""
        return all(self._not_before.get(name, 0.0) == math.inf for name in names)

    def clear(self) -> None:
        """All may be asked, at once."""
        self._not_before.clear()
        self._failed.clear()

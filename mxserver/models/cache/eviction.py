"""Which models are evicted when room is needed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass

from mxserver.models.names import ModelKey


@dataclass(frozen=True, slots=True)
class Limits:
    """0 means no limit, for either."""

    max_bytes: int = 0  # of all models together
    min_free_bytes: int = 0  # that the file system keeps free


@dataclass(frozen=True, slots=True)
class Room:
    """Bytes that are used, and bytes that running downloads will use."""

    used_bytes: int  # by models that are there
    free_bytes: int  # of the file system
    coming_bytes: int  # that running downloads still write

    def missing_bytes(self, limits: Limits) -> int:
        """How many bytes to evict so that the limits hold; 0 if they hold. The disk's size is a limit too."""
        over_limit = self.used_bytes + self.coming_bytes - limits.max_bytes if limits.max_bytes else 0
        over_disk = self.coming_bytes + limits.min_free_bytes - self.free_bytes
        return max(0, over_limit, over_disk)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A model that may be evicted. Files that several revisions share have one place."""

    key: ModelKey
    last_used: float
    places: Mapping[str, int]  # place → bytes


def eviction_order(candidates: Iterable[Candidate]) -> list[Candidate]:
    """Least recently used first."""
    return sorted(candidates, key=lambda candidate: (candidate.last_used, candidate.key))


def evictable_bytes(candidates: Iterable[Candidate], kept_places: Set[str]) -> int:
    """The bytes that removing all candidates frees: each place counts once, and not if another model needs it."""
    places = {place: size for one in candidates for place, size in one.places.items()}
    return sum(size for place, size in places.items() if place not in kept_places)

"""Chunk assignment: which holder gives which chunk, decided without threads, sockets or a clock.

A receiver has a `SwarmPlan`: what is missing, what each holder has and how fast it is. A holder has `GrantCounts`: how
often it granted each chunk. A receiver asks a holder for chunks and says which of them are rarest among the holders
that it knows; the holder grants those that it granted least. So a holder that alone has something sends each chunk
once before it sends any twice, and receivers exchange the rest among themselves.

Sets of chunks are integers, bit i for chunk i: unions and differences of 100,000 chunks cost microseconds.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from math import ceil

__all__ = [
    "ChunkRequest",
    "GrantCounts",
    "SwarmPlan",
    "all_chunks",
    "chunk_set",
    "chunks_of",
    "set_from_bytes",
    "set_to_bytes",
]

FIRST_IN_FLIGHT = 2  # chunks, as long as a holder's speed is unknown
MOST_IN_FLIGHT = 16
FEWEST_AT_MOST = 8  # also of large chunks, and of a small model
_MOST_BYTES_IN_FLIGHT = 256 << 20
_MOST_SHARE = 4  # a quarter of the model
AHEAD_SECONDS = 0.1  # what is in flight at a holder takes about so long; more delays the end of the receive
_SPEED_WEIGHT = 0.3  # of the newest measurement
_STRAGGLER_FACTOR = 4.0  # a holder this much slower than the others may be dropped for the last chunks
_STRAGGLER_SECONDS = 2.0  # but not for less than this
_SLOW_SHARE = 1 / 8  # of the other holders' median rate: who gives less loses its chunks to them
_SLOW_BYTES_PER_SECOND = 1e6  # and who gives less than this, whatever the others give
_SLOW_SECONDS = 4.0  # but a busy machine may keep it for so long
_DRIP_SECONDS = 10.0  # of what all holders together give: less than 1 MB/s for so long is of no use,
_DRIP_REST_SECONDS = 30.0  # where the rest would take longer than this


def all_chunks(count: int) -> int:
    """The set of chunks 0 to `count` - 1."""
    return (1 << count) - 1


def chunk_set(chunks: Iterable[int]) -> int:
    """The set of these chunks."""
    result = 0
    for chunk in chunks:
        result |= 1 << chunk
    return result


def chunks_of(members: int) -> Iterator[int]:
    """The chunks of a set, ascending."""
    while members:
        lowest = members & -members
        yield lowest.bit_length() - 1
        members ^= lowest


def set_to_bytes(members: int, count: int) -> bytes:
    """A set of chunks below `count` as it travels: little-endian, a bit a chunk."""
    return members.to_bytes((count + 7) // 8, "little")


def set_from_bytes(data: bytes, count: int) -> int:
    """The set that `set_to_bytes` wrote; chunks that are not below `count` are left out."""
    return int.from_bytes(data, "little") & all_chunks(count)


def _some_of(members: int, wanted: int, chance: random.Random) -> Iterator[int]:
    """Up to `wanted` chunks of a set, each the first at or after a random place."""
    while members and wanted > 0:
        start = chance.randrange(members.bit_length())
        above = members >> start
        chunk = start + (above & -above).bit_length() - 1
        members ^= 1 << chunk
        wanted -= 1
        yield chunk


class GrantCounts:
    """How often a holder granted each chunk. Not thread-safe."""

    def __init__(self, chance: random.Random | None = None) -> None:
        self._at_least: list[int] = []  # [n]: the chunks that were granted more than n times
        self._chance = chance or random.Random()  # noqa: S311 - no secret

    def grant(self, wanted: int, preferred: int, most: int) -> list[int]:
        """Grants up to `most` chunks of `wanted`: those granted least first, of these the `preferred`; counts them."""
        granted: list[int] = []
        left = wanted
        for given in (*self._at_least, 0):
            fresh = left & ~given
            for group in (fresh & preferred, fresh & ~preferred):
                granted.extend(_some_of(group, most - len(granted), self._chance))
            left &= given
            if len(granted) >= most or not left:
                break
        self._count(granted, 1)
        return granted

    def take_back(self, chunks: Iterable[int]) -> None:
        """Uncounts chunks that were granted and not fetched."""
        self._count(chunks, -1)

    def times(self, chunk: int) -> int:
        """How often this chunk was granted."""
        return sum(given >> chunk & 1 for given in self._at_least)

    def _count(self, chunks: Iterable[int], step: int) -> None:
        for chunk in chunks:
            times = self.times(chunk)
            if step > 0:
                if times == len(self._at_least):
                    self._at_least.append(0)
                self._at_least[times] |= 1 << chunk
            elif times:
                self._at_least[times - 1] &= ~(1 << chunk)


@dataclass
class _HolderState:
    have: int
    distance: int = 0
    in_flight: int = 0
    bytes_per_second: float = 0.0  # 0: not measured yet
    busy_since: float = 0.0  # the start of what is being measured


@dataclass(frozen=True)
class ChunkRequest:
    """What a receiver asks a holder for: at most `most` chunks of `chunks`, best those in `preferred`."""

    chunks: int
    preferred: int
    most: int


@dataclass
class SwarmPlan:
    """One receiver's state of all chunks. Not thread-safe; times are given to it, in seconds of any clock.

    A chunk is missing, in flight at one holder, or done. `wanted` says what to ask a holder for, `claim` takes what it
    granted, `done` and `give_back` end that. When a holder is dropped, what it had in flight is missing again: drop it
    only once nothing of it can arrive any more. Holders are named by any string. `only`: the set of chunks that are
    received at all; None: every one.
    """

    count: int
    chunk_bytes: int
    only: int | None = None
    _missing: int = field(init=False)
    _done: int = field(default=0, init=False)
    _holders: dict[str, _HolderState] = field(default_factory=dict, init=False)
    _window_began: float = field(default=0.0, init=False)  # of `drips`
    _window_bytes: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self._missing = self.everything

    @property
    def everything(self) -> int:
        """The set of chunks that are received."""
        return all_chunks(self.count) if self.only is None else self.only

    @property
    def finished(self) -> bool:
        """Whether every chunk is done."""
        return self._done == self.everything

    @property
    def completed(self) -> int:
        """The set of chunks that are done."""
        return self._done

    @property
    def missing(self) -> int:
        """The set of chunks that are neither done nor in flight."""
        return self._missing

    def add_holder(self, holder: str, have: int, distance: int | None = None) -> None:
        """Adds a holder, or updates what it has. Chunks that one at a smaller `distance` has are left to that one."""
        state = self._holders.setdefault(holder, _HolderState(0))
        state.have = have
        if distance is not None:
            state.distance = distance

    def drop_holder(self, holder: str) -> int:
        """Forgets a holder; returns the set of chunks that are missing again because of it."""
        state = self._holders.pop(holder, None)
        lost = state.in_flight if state is not None else 0
        self._missing |= lost
        return lost

    def in_flight(self, holder: str) -> int:
        """The set of chunks that `holder` is asked for."""
        return self._holders[holder].in_flight

    def limit(self, holder: str) -> int:
        """How many chunks may be in flight at this holder: a tenth of a second's worth, within limits.

        Every question costs milliseconds of both processors, so that few at a time make a fast holder slow.
        """
        speed = self._holders[holder].bytes_per_second
        if not speed:
            return FIRST_IN_FLIGHT
        sensible = min(_MOST_BYTES_IN_FLIGHT // self.chunk_bytes, self.count // _MOST_SHARE)
        most = max(FEWEST_AT_MOST, min(MOST_IN_FLIGHT, sensible))
        return max(FIRST_IN_FLIGHT, min(most, ceil(speed * AHEAD_SECONDS / self.chunk_bytes)))

    def wanted(self, holder: str, now: float) -> ChunkRequest:
        """What to ask `holder` for now; `most` is 0 when it may get nothing, or has nothing that is missing."""
        state = self._holders[holder]
        chunks = self._missing & state.have & ~self._left_to_nearer(state, now)
        room = self.limit(holder) - state.in_flight.bit_count()
        if not chunks or room <= 0:
            return ChunkRequest(0, 0, 0)
        return ChunkRequest(chunks, self._rarest(chunks, holder), room)

    def claim(self, holder: str, granted: Iterable[int], now: float) -> tuple[list[int], list[int]]:
        """Takes what `holder` granted; returns what is now in flight there, and what is no longer missing."""
        state = self._holders[holder]
        taken, declined = [], []
        for chunk in granted:
            if 0 <= chunk < self.count and self._missing >> chunk & 1:
                self._missing ^= 1 << chunk
                taken.append(chunk)
            else:
                declined.append(chunk)
        if taken and not any(other.in_flight for other in self._holders.values()):
            self._window_began, self._window_bytes = now, 0
        if taken and not state.in_flight:
            state.busy_since = now
        state.in_flight |= chunk_set(taken)
        return taken, declined

    def done(self, holder: str, chunk: int, now: float) -> None:
        """A chunk of `holder` has arrived and is verified."""
        state = self._holders[holder]
        self._end(state, chunk)
        self._done |= 1 << chunk
        self._window_bytes += self.chunk_bytes
        seconds = max(now - state.busy_since, 1e-6)
        speed = self.chunk_bytes / seconds
        before = state.bytes_per_second
        # Times, not rates, are averaged: chunks that arrive in one go must not look like a fast holder.
        state.bytes_per_second = 1 / ((1 - _SPEED_WEIGHT) / before + _SPEED_WEIGHT / speed) if before else speed
        state.busy_since = now

    def give_back(self, holder: str, chunk: int) -> None:
        """A chunk of `holder` failed: it is missing again."""
        self._end(self._holders[holder], chunk)
        self._missing |= 1 << chunk

    def can_do_without(self, holder: str) -> bool:
        """Whether other holders have all that is not done."""
        others = 0
        for name, state in self._holders.items():
            if name != holder:
                others |= state.have
        return not self.everything & ~self._done & ~others

    def reopen(self, chunks: int) -> None:
        """Chunks that were done are missing again."""
        if chunks & ~self._done:
            raise ValueError(f"chunks {list(chunks_of(chunks & ~self._done))[:5]} are not done")
        self._done &= ~chunks
        self._missing |= chunks

    def adopt(self, chunks: int) -> None:
        """Missing chunks that came from elsewhere are done."""
        if chunks & ~self._missing:
            raise ValueError(f"chunks {list(chunks_of(chunks & ~self._missing))[:5]} are not missing")
        self._missing &= ~chunks
        self._done |= chunks

    def stragglers(self, now: float) -> list[str]:
        """Holders to drop: those far slower than others that have what they have in flight, those that delay the end.

        The latter once all is in flight: an idle holder would be done much sooner. Dropping one costs what it has in
        flight.
        """
        slow = self._slow(now)
        if slow or self._missing:
            return slow
        idle = [state for state in self._holders.values() if not state.in_flight and state.bytes_per_second]
        found = []
        for name, state in self._holders.items():
            if not state.in_flight:
                continue
            left = state.in_flight.bit_count() * self.chunk_bytes
            rivals = [other.bytes_per_second for other in idle if not state.in_flight & ~other.have]
            if not rivals:
                continue
            waited = now - state.busy_since
            rest = max(left / state.bytes_per_second - waited, waited) if state.bytes_per_second else waited
            if rest > _STRAGGLER_SECONDS + _STRAGGLER_FACTOR * left / max(rivals):
                found.append(name)
        return found

    def drips(self, now: float) -> bool:
        """Whether all holders together give too little to be of use: nobody else is there to take their chunks.

        Below 1 MB/s for ten seconds, or for the time of two chunks at that rate, with more than 30 s to go. A pause in
        which nothing is in flight (a source's rate limit) does not count.
        """
        if not any(state.in_flight for state in self._holders.values()):
            return False
        seconds = now - self._window_began
        if seconds < max(_DRIP_SECONDS, 2 * self.chunk_bytes / _SLOW_BYTES_PER_SECOND):
            return False
        rate = (self._window_bytes + self.chunk_bytes) / seconds  # one more may be there in part
        left = (self.everything & ~self._done).bit_count() * self.chunk_bytes
        if rate < _SLOW_BYTES_PER_SECOND and left / rate > _DRIP_REST_SECONDS:
            return True
        self._window_began, self._window_bytes = now, 0
        return False

    def _slow(self, now: float) -> list[str]:
        """Holders that take longer for what is in flight than at an eighth of the others' median rate, or at 1 MB/s.

        And longer than four seconds. Only where others that are not slow have these chunks.
        """
        slow: dict[str, int] = {}
        for name, state in self._holders.items():
            rates = sorted(
                other.bytes_per_second
                for rival, other in self._holders.items()
                if rival != name and other.bytes_per_second
            )
            if not state.in_flight or not rates:
                continue
            slowest = max(_SLOW_SHARE * rates[len(rates) // 2], _SLOW_BYTES_PER_SECOND)
            seconds = state.in_flight.bit_count() * self.chunk_bytes / slowest
            if now - state.busy_since > max(seconds, _SLOW_SECONDS):
                slow[name] = state.in_flight
        others = 0
        for name, state in self._holders.items():
            if name not in slow and state.bytes_per_second:
                others |= state.have
        return [name for name, in_flight in slow.items() if not in_flight & ~others]

    def _left_to_nearer(self, state: _HolderState, now: float) -> int:
        """What holders that are nearer than this one have and give: those that are not far slower, and do not hang."""
        left = 0
        for other in self._holders.values():
            if other.distance >= state.distance or (other.in_flight and now - other.busy_since > _SLOW_SECONDS):
                continue
            if not other.bytes_per_second or other.bytes_per_second >= _SLOW_SHARE * state.bytes_per_second:
                left |= other.have
        return left

    def _end(self, state: _HolderState, chunk: int) -> None:
        if not state.in_flight >> chunk & 1:
            raise ValueError(f"chunk {chunk} is not in flight there")
        state.in_flight ^= 1 << chunk

    def _rarest(self, chunks: int, holder: str) -> int:
        """Those of `chunks` that the fewest other holders have."""
        at_least: list[int] = []  # [n]: the chunks that more than n other holders have
        for name, state in self._holders.items():
            if name == holder:
                continue
            carry = state.have & chunks
            for level, members in enumerate(at_least):
                at_least[level], carry = members | carry, members & carry
            if carry:
                at_least.append(carry)
        for members in at_least:
            if rare := chunks & ~members:
                return rare
            chunks &= members
        return chunks

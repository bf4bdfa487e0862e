"""What is asked for in how many GETs, where the bytes go, and what a GET that breaks off costs."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as some

from mxcore.errors import ObjectDenied, ObjectStoreError, ObjectTruncated, StoreTimeout
from mxcore.storage.remote import RemoteRange, ranged_gets
from mxcore.storage.remote.ranged_gets import Piece, RangedGets, pieces_of

OBJECTS = {name: np.random.default_rng(number).bytes(4000) for number, name in enumerate(("a", "b"))}


@some.composite
def ranges_and_room(draw: some.DrawFn) -> tuple[list[tuple[str, int, int]], int]:
    """Ranges of the objects that do not overlap, some of them next to each other, in any order; a piece's size."""
    ranges = []
    for name in OBJECTS:
        cuts = sorted(draw(some.sets(some.integers(0, 4000), max_size=8)))
        parts = [(name, begin, end - begin) for begin, end in itertools.pairwise(cuts)]
        ranges += [part for part in parts if draw(some.booleans())]
    return draw(some.permutations(ranges)), draw(some.integers(1, 2000))


def placed(ranges: list[tuple[str, int, int]], room: np.ndarray) -> list[RemoteRange]:
    """The ranges one after the other in memory, in the order that they have."""
    made, address = [], room.ctypes.data
    for name, offset, length in ranges:
        made.append(RemoteRange(name, offset, length, address))
        address += length
    return made


def expected(ranges: list[tuple[str, int, int]]) -> bytes:
    return b"".join(OBJECTS[name][offset : offset + length] for name, offset, length in ranges)


@given(ranges_and_room())
def test_pieces_are_the_ranges(drawn: tuple[list[tuple[str, int, int]], int]) -> None:
    ranges, piece_bytes = drawn
    room = np.zeros(9000, dtype=np.uint8)
    parts = placed(ranges, room)
    wanted = {(name, offset + n): address + n for name, offset, length, address in parts for n in range(length)}
    found: dict[tuple[str, int], int] = {}
    pieces = list(pieces_of(parts, piece_bytes))
    for piece in pieces:
        assert 0 < piece.length <= piece_bytes
        assert piece.length == sum(length for _, length in piece.places)
        addresses = (address + n for address, length in piece.places for n in range(length))
        found |= {(piece.path, piece.offset + n): address for n, address in enumerate(addresses)}
    assert found == wanted
    assert sum(piece.length for piece in pieces) == len(wanted), "no byte twice"


def test_neighbours_share_a_get() -> None:
    parts = [RemoteRange("a", 10, 5, 1000), RemoteRange("a", 15, 0, 0), RemoteRange("a", 15, 3, 500)]
    assert list(pieces_of([*parts, RemoteRange("a", 20, 1, 7)], 100)) == [
        Piece("a", 10, 8, ((1000, 5), (500, 3))),
        Piece("a", 20, 1, ((7, 1),)),
    ]


class Store:
    """Answers GETs in chunks of 100 bytes; each answer breaks off after `breaks_after` of them, if that is set."""

    def __init__(self, breaks_after: int | None = None, *, quietly: bool = False) -> None:
        self.breaks_after = breaks_after
        self.quietly = quietly
        self.sent_bytes = 0
        self.gets = 0
        self.lock = threading.Lock()

    def get(self, path: str, begin: int, end: int) -> _Answer:
        with self.lock:
            self.gets += 1
        return _Answer(self, OBJECTS[path][begin:end])


class _Answer:
    def __init__(self, store: Store, data: bytes) -> None:
        self.store = store
        self.data = data

    def stream(self, min_chunk_size: int) -> Iterator[bytes]:
        for number, begin in enumerate(range(0, len(self.data), 100)):
            if number == self.store.breaks_after:
                if self.store.quietly:
                    return
                raise OSError("connection reset")
            data = self.data[begin : begin + 100]
            with self.store.lock:
                self.store.sent_bytes += len(data)
            yield data


def explained(error: Exception, path: str) -> ObjectStoreError:
    return error if isinstance(error, ObjectStoreError) else StoreTimeout(f"{path}: {error}")


@given(ranges_and_room())
def test_bytes_go_where_they_are_told(drawn: tuple[list[tuple[str, int, int]], int]) -> None:
    ranges, _ = drawn
    store, room = Store(), np.zeros(9000, dtype=np.uint8)
    gets = RangedGets(store.get, explained, 4)
    try:
        gets.read(placed(ranges, room))
    finally:
        gets.close()
    data = expected(ranges)
    assert room.tobytes() == data.ljust(9000, b"\0")
    assert gets.bytes_read == store.sent_bytes == len(data)


@pytest.mark.parametrize("quietly", [False, True])
def test_a_get_that_breaks_off_goes_on_where_it_was(quietly: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As often as it takes, as long as each try brings something."""
    monkeypatch.setattr(ranged_gets, "_FIRST_WAIT_SECONDS", 0.0)
    store, room = Store(breaks_after=3, quietly=quietly), np.zeros(4000, dtype=np.uint8)
    gets = RangedGets(store.get, explained, 2)
    try:
        gets.read([RemoteRange("a", 0, 4000, room.ctypes.data)])
    finally:
        gets.close()
    assert room.tobytes() == OBJECTS["a"]
    assert store.sent_bytes == gets.bytes_read == 4000
    assert store.gets == 14
    assert gets.resumed == 13


def test_tries_that_bring_nothing_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranged_gets, "_FIRST_WAIT_SECONDS", 0.0)
    store, room = Store(breaks_after=0), np.zeros(4000, dtype=np.uint8)
    gets = RangedGets(store.get, explained, 1)
    try:
        with pytest.raises(StoreTimeout, match="a: connection reset"):
            gets.read([RemoteRange("a", 0, 4000, room.ctypes.data)])
    finally:
        gets.close()
    assert store.gets == ranged_gets.ATTEMPTS


@pytest.mark.parametrize("error", [ObjectDenied("no"), ObjectTruncated("short")])
def test_what_another_try_cannot_help_is_told_at_once_and_ends_the_others(error: ObjectStoreError) -> None:
    """Pieces that were not begun are left; nothing arrives after the error."""
    calls: list[str] = []

    def get(path: str, begin: int, end: int) -> _Answer:
        calls.append(path)
        if path == "a":
            raise error
        return Store().get(path, begin, end)

    gets = RangedGets(get, explained, 1)
    room = np.zeros(8000, dtype=np.uint8)
    parts = [RemoteRange("a", 0, 4000, room.ctypes.data), RemoteRange("b", 0, 4000, room.ctypes.data + 4000)]
    try:
        with pytest.raises(type(error)):
            gets.read(parts)
        before = room.tobytes()
        gets.close()
        assert calls.count("a") == 1
        assert room.tobytes() == before
    finally:
        gets.close()


def test_an_answer_that_is_too_long_is_an_error_and_writes_nothing_beyond() -> None:
    room = np.zeros(200, dtype=np.uint8)
    failed: list[str] = []

    def told(error: Exception, path: str) -> ObjectStoreError:
        failed.append(str(error))
        return ObjectStoreError(str(error))

    gets = RangedGets(lambda path, begin, end: Store().get(path, begin, end + 50), told, 1)
    try:
        with pytest.raises(ObjectStoreError, match="50 bytes more than were asked for"):
            gets.read([RemoteRange("a", 0, 150, room.ctypes.data)])
    finally:
        gets.close()
    assert room.tobytes() == OBJECTS["a"][:150] + bytes(50)

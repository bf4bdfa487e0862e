"""Ranges of objects by obstore: several GETs side by side, whose bytes go into their place as they come.

A GET that breaks off goes on at the byte where it was, so that a cut costs no more than what was on the wire.
"""

from __future__ import annotations

import ctypes
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import Any, NamedTuple

from mxcore.errors import ObjectStoreError, StoreTimeout
from mxcore.storage.remote.remote_folder import RemoteRange

__all__ = ["Piece", "RangedGets", "pieces_of"]

PIECE_BYTES = 8 * 1024 * 1024  # of one GET
ATTEMPTS = 4  # in a row that bring nothing
_FIRST_WAIT_SECONDS = 0.2
_LONGEST_WAIT_SECONDS = 5.0


class Piece(NamedTuple):
    """A stretch of an object, and where its bytes go: (address, length) one after the other."""

    path: str
    offset: int
    length: int
    places: tuple[tuple[int, int], ...]


def pieces_of(ranges: Sequence[RemoteRange], piece_bytes: int = PIECE_BYTES) -> Iterator[Piece]:
    """Cuts ranges into pieces; ranges that follow each other in an object share one, so that small ones cost no GET."""
    path, begin, at = "", 0, 0
    places: list[tuple[int, int]] = []
    for part in sorted(part for part in ranges if part.length):
        offset, left, address = part.offset, part.length, part.address
        while left:
            if places and (part.path != path or offset != at or at - begin == piece_bytes):
                yield Piece(path, begin, at - begin, tuple(places))
                places = []
            if not places:
                path, begin, at = part.path, offset, offset
            length = min(left, piece_bytes - (at - begin))
            places.append((address, length))
            offset, at, address, left = offset + length, at + length, address + length, left - length
    if places:
        yield Piece(path, begin, at - begin, tuple(places))


class RangedGets:
    """Reads pieces over at most `connections` connections. Thread-safe; `close` must be called.

    `get(path, begin, end)` gives obstore's answer to a GET of those bytes; `explain(error, path)` makes one of our
    errors of what it or its stream raised. A StoreTimeout is tried again, four times in a row that bring nothing.
    """

    def __init__(
        self,
        get: Callable[[str, int, int], Any],
        explain: Callable[[Exception, str], ObjectStoreError],
        connections: int,
    ) -> None:
        self._get = get
        self._explain = explain
        self._pool = ThreadPoolExecutor(connections, thread_name_prefix="mx-object")
        self._lock = threading.Lock()
        self.bytes_read = 0
        self.resumed = 0  # times that a broken GET went on

    def read(self, ranges: Sequence[RemoteRange]) -> None:
        """Returns, or raises the first error, when nothing arrives in that memory any more."""
        stop = threading.Event()
        started = [self._pool.submit(self._read_piece, piece, stop) for piece in pieces_of(ranges)]
        try:
            wait(started, return_when=FIRST_EXCEPTION)
        finally:
            stop.set()
            for future in started:
                future.cancel()
            wait(started)
        for future in started:
            if not future.cancelled() and (error := future.exception()) is not None:
                raise error

    def _read_piece(self, piece: Piece, stop: threading.Event) -> None:
        place = _Place(piece.places)
        failures = 0
        while place.filled < piece.length and not stop.is_set():
            before = place.filled
            try:
                self._fill(piece, place, stop)
            except Exception as error:  # noqa: BLE001 - becomes one of ours
                told = self._explain(error, piece.path)
                failures = 1 if place.filled > before else failures + 1
                if not isinstance(told, StoreTimeout) or failures >= ATTEMPTS:
                    raise told from None  # the cause may repeat what was signed
                with self._lock:
                    self.resumed += 1
                stop.wait(random.uniform(0, min(_LONGEST_WAIT_SECONDS, _FIRST_WAIT_SECONDS * 2**failures)))  # noqa: S311
            finally:
                with self._lock:
                    self.bytes_read += place.filled - before

    def _fill(self, piece: Piece, place: _Place, stop: threading.Event) -> None:
        answer = self._get(piece.path, piece.offset + place.filled, piece.offset + piece.length)
        for data in answer.stream(min_chunk_size=0):
            if stop.is_set():
                return
            place.add(data)
        if place.filled < piece.length:
            raise TimeoutError(f"the answer ended {piece.length - place.filled} bytes early")

    def close(self) -> None:
        """Idempotent."""
        self._pool.shutdown(wait=True)


class _Place:
    """Memory in several stretches that is filled from its beginning."""

    def __init__(self, places: Sequence[tuple[int, int]]) -> None:
        self._places = places
        self._number = 0
        self._at = 0  # in the stretch of that number
        self.filled = 0

    def add(self, data: bytes) -> None:
        """Copies without the GIL: first touches of fresh pages are slow, and happen side by side."""
        while data:
            if self._number == len(self._places):
                raise ValueError(f"the answer has {len(data)} bytes more than were asked for")
            address, size_bytes = self._places[self._number]
            length = min(len(data), size_bytes - self._at)
            ctypes.memmove(address + self._at, data, length)
            data = data[length:] if length < len(data) else b""
            self._at += length
            self.filled += length
            if self._at == size_bytes:
                self._number, self._at = self._number + 1, 0

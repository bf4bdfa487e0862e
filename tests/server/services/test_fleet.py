"""Who reads storage for all: turns on a clock that the test turns, and the service of a real server."""

from __future__ import annotations

import pytest

from mxserver.store import LEASE_SECONDS, MemoryTurns
from mxserver.store.turns import EVERYBODY_SECONDS
from mxserver.waiting import ElectionKey, StorageElections
from mxserver.wire.proto import mx_pb2

KEY = ElectionKey("0123456789abcdef", 0)


class TurnedClock:
    def __init__(self) -> None:
        self.seconds = 1000.0

    def monotonic_seconds(self) -> float:
        return self.seconds

    def unix_ms(self) -> int:
        return round(self.seconds * 1000)


def made(clock: TurnedClock) -> StorageElections:
    return StorageElections(MemoryTurns(clock), clock.monotonic_seconds)


@pytest.fixture
def clock() -> TurnedClock:
    return TurnedClock()


@pytest.fixture
def turns(clock: TurnedClock) -> StorageElections:
    return made(clock)


def take(
    turns: StorageElections, worker: str, epoch: int = 0, *, key: ElectionKey = KEY, starting: bool = False
) -> mx_pb2.TakeStorageTurnResponse:
    return turns.take(key, worker, epoch, lambda: starting)


def test_one_reads_and_the_others_wait(turns: StorageElections) -> None:
    first = take(turns, "a")
    assert first.turn == mx_pb2.STORAGE_TURN_YOURS
    assert first.lease_ms == LEASE_SECONDS * 1000
    second = take(turns, "b")
    assert (second.turn, second.reader_worker_id) == (mx_pb2.STORAGE_TURN_WAIT, "a")
    assert second.retry_ms > 0
    assert take(turns, "c", key=ElectionKey(KEY.source_id, 1)).turn == mx_pb2.STORAGE_TURN_YOURS
    assert take(turns, "d", key=ElectionKey(KEY.source_id, 0, "zone=b")).turn == mx_pb2.STORAGE_TURN_YOURS
    assert take(turns, "a", first.epoch).epoch == first.epoch


def test_an_earlier_life_of_the_reader_extends_nothing(turns: StorageElections, clock: TurnedClock) -> None:
    first = take(turns, "a")
    clock.seconds += LEASE_SECONDS + 0.1
    second = take(turns, "a")
    assert take(turns, "a", first.epoch).turn == mx_pb2.STORAGE_TURN_WAIT
    assert take(turns, "a", second.epoch).epoch == second.epoch


def test_a_reader_that_dies_is_followed_within_seconds(turns: StorageElections, clock: TurnedClock) -> None:
    first = take(turns, "a")
    clock.seconds += LEASE_SECONDS / 2
    assert take(turns, "a", first.epoch).turn == mx_pb2.STORAGE_TURN_YOURS
    clock.seconds += LEASE_SECONDS - 0.1
    assert take(turns, "b").turn == mx_pb2.STORAGE_TURN_WAIT
    clock.seconds += 0.2
    second = take(turns, "b")
    assert second.turn == mx_pb2.STORAGE_TURN_YOURS
    assert second.epoch > first.epoch
    assert take(turns, "a", first.epoch).turn == mx_pb2.STORAGE_TURN_WAIT
    assert not turns.end(KEY, "a", first.epoch, shared=False)
    assert take(turns, "c").turn == mx_pb2.STORAGE_TURN_WAIT


def test_after_the_end_somebody_else_may_read(turns: StorageElections) -> None:
    assert turns.end(KEY, "a", take(turns, "a").epoch, shared=True)
    assert take(turns, "b").turn == mx_pb2.STORAGE_TURN_YOURS


def test_what_cannot_be_shared_is_not_waited_for(turns: StorageElections, clock: TurnedClock) -> None:
    turns.end(KEY, "a", take(turns, "a").epoch, shared=False)
    assert take(turns, "b").turn == mx_pb2.STORAGE_TURN_EVERYBODY
    clock.seconds += EVERYBODY_SECONDS + 1
    assert take(turns, "b").turn == mx_pb2.STORAGE_TURN_YOURS


def test_after_a_restart_living_readers_keep_their_turn(clock: TurnedClock) -> None:
    before = take(made(clock), "a")
    turns = made(clock)
    assert take(turns, "b", starting=True).turn == mx_pb2.STORAGE_TURN_WAIT
    after = take(turns, "a", before.epoch, starting=True)
    assert after.turn == mx_pb2.STORAGE_TURN_YOURS
    assert after.epoch >= before.epoch
    assert take(turns, "b").reader_worker_id == "a"
    alone = made(clock)
    assert take(alone, "b", starting=True).turn == mx_pb2.STORAGE_TURN_WAIT
    clock.seconds += LEASE_SECONDS
    assert take(alone, "b", starting=True).turn == mx_pb2.STORAGE_TURN_YOURS


def test_many_that_wait_ask_less_often(turns: StorageElections, clock: TurnedClock) -> None:
    take(turns, "a")
    first = take(turns, "b").retry_ms
    for number in range(500):
        last = take(turns, f"w{number}").retry_ms
    assert first < last <= 5000
    clock.seconds += 60
    assert take(turns, "b").turn == mx_pb2.STORAGE_TURN_YOURS
    assert take(turns, "c").retry_ms == first

"""Turns of every store: one worker has it, under a lease, whichever server it asks."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from mxserver.store import LEASE_SECONDS, SourceStore, Turn
from mxserver.store.turns import EVERYBODY_SECONDS
from tests.server.stores import KINDS, HandClock

KEY = "0:16:0123456789abcdef"


@pytest.fixture
def clock() -> HandClock:
    return HandClock()


@pytest.fixture(params=KINDS, ids=lambda kind: kind.name)
def store(request: pytest.FixtureRequest, tmp_path: Path, clock: HandClock) -> Iterator[SourceStore]:
    opened = request.param.open(tmp_path, clock)
    yield opened
    opened.close()


def take(store: SourceStore, worker: str, epoch: int = 0, key: str = KEY) -> Turn:
    return store.turns.take(key, worker, epoch, lambda: True)


def test_one_has_it_and_keeps_it_while_it_renews(store: SourceStore, clock: HandClock) -> None:
    first = take(store, "a")
    assert (first.worker_id, first.is_taken) == ("a", True)
    assert take(store, "b") == Turn("a", first.epoch)
    assert store.turns.now(KEY)[:2] == ("a", first.epoch)
    assert take(store, "b", key="1" + KEY).is_taken
    for _ in range(3):
        clock.advance(LEASE_SECONDS - 0.1)
        assert take(store, "a", first.epoch) == first
    clock.advance(LEASE_SECONDS + 0.1)
    assert store.turns.now(KEY) == Turn()
    second = take(store, "b")
    assert second.is_taken
    assert second.epoch > first.epoch
    assert take(store, "a", first.epoch) == Turn("b", second.epoch)
    assert not store.turns.end(KEY, "a", first.epoch, everybody=True)


def test_an_earlier_life_extends_nothing(store: SourceStore, clock: HandClock) -> None:
    first = take(store, "a")
    clock.advance(LEASE_SECONDS + 0.1)
    second = take(store, "a")
    assert not take(store, "a", first.epoch).is_taken
    assert take(store, "a", second.epoch).is_taken
    assert not store.turns.end(KEY, "a", first.epoch, everybody=False)
    assert store.turns.end(KEY, "a", second.epoch, everybody=False)
    assert take(store, "b").is_taken


def test_what_is_everybodys_is_nobodys_for_a_while(store: SourceStore, clock: HandClock) -> None:
    assert store.turns.end(KEY, "a", take(store, "a").epoch, everybody=True)
    assert take(store, "b") == store.turns.now(KEY) == Turn(everybody=True)
    clock.advance(EVERYBODY_SECONDS + 1)
    assert take(store, "b").is_taken


REDIS = next(kind for kind in KINDS if kind.name == "redis")


def test_two_replicas_give_one_turn(tmp_path: Path, clock: HandClock) -> None:
    replicas = [REDIS.open(tmp_path, clock) for _ in range(2)]
    try:
        taken: list[Turn] = []
        threads = [
            threading.Thread(target=lambda n=n: taken.append(take(replicas[n % 2], f"w{n}")))  # type: ignore[misc]
            for n in range(16)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sum(turn.is_taken for turn in taken) == 1
        [winner] = {turn.worker_id for turn in taken}
        assert {replica.turns.now(KEY).worker_id for replica in replicas} == {winner}
    finally:
        for replica in replicas:
            replica.close()


def test_a_replica_that_comes_later_knows_the_turn(tmp_path: Path, clock: HandClock) -> None:
    first = REDIS.open(tmp_path, clock)
    epoch = take(first, "a").epoch
    first.close()
    second = REDIS.open(tmp_path, clock)
    assert take(second, "b") == Turn("a", epoch)
    assert take(second, "a", epoch).is_taken
    second.close()

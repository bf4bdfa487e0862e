"""The plan in swarms of hundreds of workers on a fake clock: joins and deaths at any time."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mxbench.fleet import swarm_simulator
from mxbench.fleet.swarm_simulator import SEED, Setting, Swarm, table
from mxcore.transfer.layout import all_chunks

SLOW = {"bytes_per_second": 1e9, "look_seconds": 0.1}


def check(swarm: Swarm) -> None:
    """Every living worker has everything, each chunk came once, and no limit was passed."""
    for worker in swarm.workers.values():
        if worker.alive:
            assert worker.have == all_chunks(swarm.setting.chunks), worker.name
            if worker.name != SEED and not worker.from_storage:
                assert worker.arrived == [1] * swarm.setting.chunks
        assert max(worker.arrived, default=0) <= 1
    assert swarm.most_in_flight_over_limit <= 0
    assert swarm.most_readers_seen <= swarm.setting.most_readers


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(1, 60), st.integers(0, 1000), st.data())
def test_any_order_of_joins_and_deaths_ends(receivers: int, chunks: int, seed: int, data: st.DataObject) -> None:
    times = st.floats(0, 3)
    joins = data.draw(st.lists(times, min_size=receivers, max_size=receivers))
    deaths = data.draw(st.lists(st.tuples(times, st.integers(0, receivers)), max_size=receivers))
    swarm = Swarm(Setting(receivers, chunks, **SLOW), seed, joins=joins, deaths=deaths)
    swarm.run()
    check(swarm)


def test_full_holders_that_lack_the_same_keep_nobody_for_ever() -> None:
    """The seed dies, a dozen have the same chunks, and each is told by all others that they are full."""
    chance = random.Random(5)
    joins = [0.3 * chance.random() for _ in range(24)]
    swarm = Swarm(Setting(24, 60, **SLOW), 874, joins=joins, deaths=[(0.75, 0)])
    seconds = swarm.run()
    check(swarm)
    assert any(worker.from_storage for worker in swarm.workers.values())
    assert seconds < swarm.setting.timeout_seconds / 4, "their patience ended, not the time for a transfer"


def test_readers_of_a_busy_source_wait_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """192 find the eight places of the only source taken for far longer than their patience: nobody gives up."""
    swarm = Swarm(Setting(200, 60, patience_seconds=2.0, bytes_per_second=1e9, timeout_seconds=math.inf), 1)
    monkeypatch.setattr(swarm, "_told", lambda me: [swarm.workers[SEED]])
    assert swarm.run() > 50 * swarm.setting.patience_seconds
    check(swarm)
    assert swarm.refusals > 192
    assert not any(worker.from_storage for worker in swarm.workers.values())


def test_hundreds_of_workers_of_which_some_die() -> None:
    deaths = [(0.05 * number, 3 * number) for number in range(1, 60)]
    swarm = Swarm(Setting(300, 60, **SLOW), 3, deaths=deaths)
    swarm.run()
    check(swarm)
    assert not any(worker.from_storage for worker in swarm.workers.values())  # the seed lived


def test_a_seed_that_dies_early_leaves_the_rest_to_storage() -> None:
    swarm = Swarm(Setting(10, 100, **SLOW), 3, deaths=[(0.2, 0)])
    swarm.run()
    check(swarm)
    assert any(worker.from_storage for worker in swarm.workers.values())


@pytest.mark.parametrize("rate", [25e6, 1e9])
def test_eight_receivers_take_little_longer_than_one(rate: float) -> None:
    chunk_bytes = int(rate / 50)
    [one, eight] = table([1, 8], Setting(0, 400, chunk_bytes, rate, news_seconds=0.02))
    assert one.over_one == 1
    assert eight.over_one < 1.35
    assert eight.seed_sent < 1.5


def test_a_full_holder_refuses_and_says_when_to_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def refusals() -> int:
        swarm = Swarm(Setting(30, 60, most_readers=2, **SLOW), 1)
        swarm.run()
        check(swarm)
        return swarm.refusals

    told = refusals()
    for name in ("SHORTEST_SECONDS", "SECONDS_A_READER"):
        monkeypatch.setattr(swarm_simulator, name, 0.0)
    assert 0 < 1.5 * told < refusals(), "those that were told to wait do not ask at each look"


def test_a_reader_that_died_keeps_its_place_for_its_lease() -> None:
    swarms = [
        Swarm(Setting(2, 100, most_readers=1, lease_seconds=lease, **SLOW), 1, joins=[0.0, 0.1], deaths=[(0.3, 1)])
        for lease in (0.0, 4.0)
    ]
    at_once, later = (swarm.run() for swarm in swarms)
    assert at_once + 2.0 < later
    for swarm in swarms:
        check(swarm)
        assert not swarm.workers["w2"].from_storage


def test_calls_take_their_time_at_the_server_and_at_holders() -> None:
    quick, slow = (
        Swarm(Setting(50, 40, server_call_seconds=each, holder_call_seconds=each, **SLOW), 1) for each in (0.0, 0.01)
    )
    assert quick.run() + 0.9 < slow.run()
    assert quick.longest_server_wait == 0 == quick.holder_core_share()
    assert slow.longest_server_wait >= 50 * 3 * 0.01 * 0.99
    assert 0 < slow.holder_core_share() <= 1
    assert slow.server_calls == 50 * 5


def test_memory_is_registered_for_few_holders_at_a_time() -> None:
    swarm = Swarm(Setting(12, 80, register_seconds=0.5, registrations=2, **SLOW), 1)
    most = 0
    opened = swarm._open

    def counted(name: str, holder: str) -> None:
        nonlocal most
        opened(name, holder)
        most = max(most, len(swarm.workers[name].holders))

    swarm._open = counted  # type: ignore[method-assign]
    swarm.run()
    check(swarm)
    assert most == 2

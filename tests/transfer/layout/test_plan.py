"""The plan of a swarm: who is asked for which chunk, and who gives which."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mxcore.transfer.layout import (
    ChunkRequest,
    GrantCounts,
    SwarmPlan,
    all_chunks,
    chunk_set,
    chunks_of,
    set_from_bytes,
    set_to_bytes,
)
from mxcore.transfer.layout.plan import FEWEST_AT_MOST, FIRST_IN_FLIGHT, MOST_IN_FLIGHT

NOTHING = ChunkRequest(0, 0, 0)


@given(st.sets(st.integers(0, 200)))
def test_sets_are_what_they_are_made_of(members: set[int]) -> None:
    as_set = chunk_set(members)
    assert list(chunks_of(as_set)) == sorted(members)
    assert set_from_bytes(set_to_bytes(as_set, 201), 201) == as_set
    assert set_from_bytes(set_to_bytes(as_set, 201), 100) == chunk_set(m for m in members if m < 100)


def new_plan(count: int, **have: int) -> SwarmPlan:
    plan = SwarmPlan(count, 100)
    for holder, members in have.items():
        plan.add_holder(holder, members)
    return plan


def test_the_rarest_are_preferred() -> None:
    plan = new_plan(6, seed=all_chunks(6), a=chunk_set([0, 1, 2]), b=chunk_set([0, 1]), c=chunk_set([0]))
    assert plan.wanted("seed", 0.0) == ChunkRequest(all_chunks(6), chunk_set([3, 4, 5]), FIRST_IN_FLIGHT)
    assert plan.wanted("a", 0.0).preferred == chunk_set([2])
    assert plan.wanted("c", 0.0).preferred == chunk_set([0])


def test_what_is_granted_is_in_flight_once() -> None:
    plan = new_plan(4, a=all_chunks(4), b=all_chunks(4))
    assert plan.claim("a", [0, 1], 0.0) == ([0, 1], [])
    assert plan.claim("b", [1, 2, 99], 0.0) == ([2], [1, 99])
    assert plan.missing == chunk_set([3])
    assert plan.wanted("a", 0.0) == NOTHING
    assert plan.wanted("b", 0.0) == ChunkRequest(chunk_set([3]), chunk_set([3]), FIRST_IN_FLIGHT - 1)
    plan.done("a", 0, 1.0)
    assert plan.completed == 1
    assert plan.drop_holder("a") == chunk_set([1])
    assert plan.missing == chunk_set([1, 3])
    assert plan.drop_holder("a") == 0
    plan.give_back("b", 2)
    with pytest.raises(ValueError, match="not in flight"):
        plan.done("b", 2, 1.0)
    plan.reopen(1)
    assert plan.missing == all_chunks(4)
    with pytest.raises(ValueError, match="are not done"):
        plan.reopen(3)


@pytest.mark.parametrize(("count", "most"), [(200, MOST_IN_FLIGHT), (40, 10), (12, FEWEST_AT_MOST)])
def test_a_fast_holder_is_asked_for_more(count: int, most: int) -> None:
    """Of a small model for a quarter at most: a holder that is lost costs what it was asked for."""
    plan = new_plan(count, fast=all_chunks(count), slow=all_chunks(count))
    assert plan.limit("fast") == FIRST_IN_FLIGHT
    plan.claim("fast", [0, 1], 0.0)
    plan.claim("slow", [2, 3], 0.0)
    for at, chunk in enumerate([0, 1]):
        plan.done("fast", chunk, 0.005 * (at + 1))  # 20,000 bytes a second: 20 chunks in a tenth of a second
    plan.done("slow", 2, 10.0)
    assert plan.limit("fast") == most
    assert plan.limit("slow") == FIRST_IN_FLIGHT
    assert plan.wanted("fast", 0.0).most == most


def test_a_burst_does_not_make_a_holder_look_fast() -> None:
    plan = new_plan(40, a=all_chunks(40))
    plan.claim("a", range(30), 0.0)
    plan.done("a", 0, 10.0)
    for chunk in range(1, 4):
        plan.done("a", chunk, 10.0)  # all at once, after a long time
    assert plan.limit("a") == FIRST_IN_FLIGHT


def test_whoever_holds_up_the_end_is_named() -> None:
    plan = new_plan(3, fast=all_chunks(3), slow=all_chunks(3))
    plan.claim("fast", [0], 0.0)
    plan.claim("slow", [1, 2], 0.0)
    assert plan.stragglers(100.0) == []  # nobody is idle and known to be faster
    plan.done("fast", 0, 0.1)
    assert plan.stragglers(0.2) == []
    assert plan.stragglers(5.0) == ["slow"]
    plan.give_back("slow", 1)
    assert plan.stragglers(3.0) == []  # there is something to do for others
    plan.claim("fast", [1], 5.0)
    plan.add_holder("fast", chunk_set([0, 1]))
    plan.done("fast", 1, 5.1)
    assert plan.stragglers(9.0) == []  # nobody else has chunk 2


def test_who_is_far_slower_than_the_others_is_named_at_any_time() -> None:
    """Below an eighth of the median of the others, and while others have what it is asked for."""
    plan = SwarmPlan(100, 16 << 20)
    for name in ("a", "b", "c", "slow"):
        plan.add_holder(name, all_chunks(100))
    plan.claim("slow", [0, 1], 0.0)
    for number, name in enumerate(("a", "b", "c"), 2):
        plan.claim(name, [number], 0.0)
    assert plan.stragglers(40.0) == []  # nobody's rate is known
    for number, name in enumerate(("a", "b", "c"), 2):
        plan.done(name, number, 1.0)  # 16.8 MB/s: an eighth is 2.1 MB/s
    assert plan.missing
    assert plan.stragglers(15.0) == []  # 32 MiB in 16 s are enough
    assert plan.stragglers(17.0) == ["slow"]
    for name in ("a", "b", "c"):
        plan.add_holder(name, all_chunks(100) & ~chunk_set([1]))
    assert plan.stragglers(1000.0) == []  # it alone has chunk 1
    for name in ("a", "b", "c"):
        plan.add_holder(name, all_chunks(100))
    assert plan.drop_holder("slow") == chunk_set([0, 1])
    assert plan.missing & chunk_set([0, 1]) == chunk_set([0, 1])  # for the others


def test_what_a_near_holder_has_is_left_to_it() -> None:
    plan = SwarmPlan(10, 1 << 20)
    plan.add_holder("near", chunk_set(range(4)), 0)
    plan.add_holder("far", all_chunks(10), 3)
    assert plan.wanted("near", 0.0).chunks == chunk_set(range(4))
    assert plan.wanted("far", 0.0).chunks == chunk_set(range(4, 10))
    plan.claim("near", [0], 0.0)
    assert plan.wanted("far", 5.0).chunks == chunk_set(range(1, 10))  # it hangs
    plan.done("near", 0, 10.0)  # 0.1 MB/s
    assert plan.wanted("far", 10.0).chunks == chunk_set(range(4, 10))
    plan.claim("far", [4], 10.0)
    plan.done("far", 4, 10.1)  # a hundred times as fast
    assert plan.wanted("far", 10.1).chunks == chunk_set([1, 2, 3, 5, 6, 7, 8, 9])
    plan.drop_holder("near")
    plan.add_holder("far", all_chunks(10))  # its distance stays
    plan.add_holder("other", all_chunks(10), 4)
    assert plan.wanted("other", 10.1) == NOTHING


def test_less_than_a_megabyte_a_second_is_slow_whatever_others_give() -> None:
    plan = SwarmPlan(8, 1 << 20)
    for name in ("other", "slow"):
        plan.add_holder(name, all_chunks(8))
    plan.claim("slow", [0, 1, 2, 3, 4], 0.0)
    plan.claim("other", [5], 0.0)
    plan.done("other", 5, 10.0)  # 0.1 MB/s
    assert plan.stragglers(5.0) == []
    assert plan.stragglers(5.5) == ["slow"]


def test_a_leaving_holder_is_needed_or_not() -> None:
    plan = new_plan(3, seed=all_chunks(3), relay=chunk_set([1, 2]))
    assert not plan.can_do_without("seed")
    assert plan.can_do_without("relay")
    plan.claim("seed", [0], 0.0)
    assert not plan.can_do_without("seed")
    plan.done("seed", 0, 1.0)
    assert plan.can_do_without("seed")


def test_what_was_given_least_is_granted_first() -> None:
    giver = GrantCounts(random.Random(1))
    everything = all_chunks(10)
    first = giver.grant(everything, 0, 6)
    second = giver.grant(everything, 0, 6)
    assert len(set(first)) == len(set(second)) == 6
    assert set(first) | set(second) == set(range(10))
    assert [giver.times(chunk) for chunk in range(10)].count(2) == 2
    giver.take_back([first[0]])
    assert giver.grant(everything, 0, 1) == [first[0]] or giver.times(first[0]) == 1
    giver.take_back([*range(10), *range(10), *range(10)])
    assert [giver.times(chunk) for chunk in range(10)] == [0] * 10


def test_among_equals_the_preferred_is_granted() -> None:
    giver = GrantCounts(random.Random(1))
    assert set(giver.grant(all_chunks(100), chunk_set([7, 77]), 2)) == {7, 77}
    assert set(giver.grant(all_chunks(100), chunk_set([7, 77]), 98)).isdisjoint({7, 77})
    assert set(giver.grant(chunk_set([1, 2]), 0, 5)) == {1, 2}
    assert giver.grant(0, 0, 5) == []
    assert giver.grant(7, 0, 0) == []


@settings(deadline=None)
@given(st.integers(1, 60), st.integers(2, 6), st.randoms(use_true_random=False))
def test_every_plan_ends_with_every_chunk_once(count: int, holders: int, chance: random.Random) -> None:
    plan = SwarmPlan(count, 100)
    givers = {f"h{i}": GrantCounts(chance) for i in range(holders)}
    for name in givers:
        plan.add_holder(name, all_chunks(count) if name == "h0" else chunk_set(chance.sample(range(count), count // 2)))
    left = sorted(givers)
    done: list[int] = []
    now = 0.0
    while not plan.finished:
        now += chance.random()
        assert now < 100 * count
        name = chance.choice(left)
        if name != "h0" and chance.random() < 0.05:
            plan.drop_holder(name)
            left.remove(name)
            continue
        wanted = plan.wanted(name, 0.0)
        taken, declined = plan.claim(name, givers[name].grant(wanted.chunks, wanted.preferred, wanted.most), now)
        assert declined == []
        assert len(taken) <= wanted.most
        for chunk in list(chunks_of(plan.in_flight(name))):
            if chance.random() < 0.7:
                plan.done(name, chunk, now)
                done.append(chunk)
            elif chance.random() < 0.3:
                plan.give_back(name, chunk)
    assert sorted(done) == list(range(count))


def test_a_plan_of_some_chunks_ends_with_these() -> None:
    plan = SwarmPlan(8, 100, only=chunk_set([2, 5]))
    plan.add_holder("a", chunk_set([2, 3]))
    plan.add_holder("b", all_chunks(8))
    assert plan.wanted("a", 0.0).chunks == chunk_set([2])
    assert plan.claim("a", [2, 3], 0.0) == ([2], [3])  # what is not wanted is declined
    plan.done("a", 2, 1.0)
    assert not plan.finished
    assert plan.can_do_without("a")
    assert not plan.can_do_without("b")
    assert plan.claim("b", [5], 1.0) == ([5], [])
    plan.done("b", 5, 2.0)
    assert plan.finished
    assert SwarmPlan(8, 100, only=0).finished

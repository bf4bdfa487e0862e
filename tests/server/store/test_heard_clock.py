"""The clock of leases: time in which nobody could be heard does not pass, within bounds."""

from __future__ import annotations

import pytest

from mxserver.store import HeardClock, Leases, MemoryStore, Query
from mxserver.store.clock import LONGEST_GAP_SECONDS, MOST_GAPS
from tests.server.stores import READY, STALE, publication

LEASE = 90.0


class Machine:
    """Its clock, and the one of leases."""

    def __init__(self, lease_seconds: float = LEASE) -> None:
        self.seconds = 1000.0
        self.clock = HeardClock(lease_seconds, lambda: self.seconds)

    def passes(self, seconds: float) -> None:
        """Time, with a heartbeat each second."""
        for _ in range(round(seconds)):
            self.seconds += 1
            self.clock.heard()


@pytest.fixture
def machine() -> Machine:
    return Machine()


def test_time_passes_while_heartbeats_are_heard(machine: Machine) -> None:
    machine.passes(100)
    assert machine.clock.monotonic_seconds() == 100


def test_nobody_is_stale_after_the_machine_was_suspended(machine: Machine) -> None:
    """Not at the first look either, before anything was heard: a listing may be the first call."""
    store = MemoryStore(Leases(LEASE, 3600.0), machine.clock)
    store.publish(publication(status=READY))
    machine.passes(60)
    machine.seconds += 36_000
    assert [record.status for record in store.find(Query())] == [READY]
    assert store.sweep() == (0, 0)
    machine.passes(20)
    assert [record.status for record in store.find(Query())] == [READY]
    machine.passes(10)
    assert [record.status for record in store.find(Query())] == [STALE]


def test_a_gap_counts_for_a_few_seconds(machine: Machine) -> None:
    machine.seconds += 500
    assert machine.clock.monotonic_seconds() == LONGEST_GAP_SECONDS
    machine.clock.heard()
    assert machine.clock.monotonic_seconds() == LONGEST_GAP_SECONDS


def test_a_server_that_is_always_too_slow_keeps_the_dead_for_a_bounded_time(machine: Machine) -> None:
    """It hears somebody every 13 s: ten of the gaps are left out in the time of one lease, the rest counts."""
    while machine.clock.monotonic_seconds() < LEASE:
        machine.seconds += 13
        machine.clock.heard()
    assert machine.seconds - 1000 <= LEASE + MOST_GAPS * (13 - LONGEST_GAP_SECONDS) + 13


def test_short_leases_have_short_gaps() -> None:
    machine = Machine(1.0)
    machine.seconds += 10
    assert machine.clock.monotonic_seconds() == 0.5

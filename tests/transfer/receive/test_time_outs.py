"""Time-outs follow progress: what arrives is kept, and a holder that is busy for a while keeps its readers."""

from __future__ import annotations

import math
import time
from typing import Any

import pytest

from mxcore.errors import ChunksMissing, SourceBusy, SourceUnreachable
from mxcore.transfer.layout import all_chunks
from mxcore.transfer.move import LeaseKeeper, SourceClient, lease_keeper
from mxcore.transfer.receive.pace import MEGABYTE, Pace
from mxcore.transfer.serve.refused_readers import LONGEST_SECONDS, SECONDS_A_READER, SHORTEST_SECONDS, RefusedReaders
from tests.transfer.conftest import wait_for
from tests.transfer.fleet_member import SEED, NewMember


def test_a_transfer_that_moves_has_no_deadline(new_member: NewMember, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mxcore.transfer.receive.receiver.MEGABYTE", 0)  # a busy machine may be slower
    source, target = new_member(SEED).serve(), new_member(MX_TRANSFER_TIMEOUT=1e-9)
    target.receive([source])
    assert target.is_right


def test_what_ends_by_the_clock_keeps_what_came(new_member: NewMember, monkeypatch: pytest.MonkeyPatch) -> None:
    holder = new_member(SEED)
    source = holder.serve()
    served = holder.membership.holder
    assert served is not None
    served.update(all_chunks(len(served.chunks) // 2))  # the rest never comes
    half = holder.layout.total_bytes // 3
    monkeypatch.setattr(Pace, "bytes_per_second", lambda pace, now, done: 0.0 if done > half else math.inf)
    with pytest.raises(ChunksMissing, match="MX_TRANSFER_TIMEOUT") as raised:
        new_member(MX_TRANSFER_TIMEOUT=1e-9, MX_STALL_TIMEOUT_SECS=600).receive([source])
    assert raised.value.partial is not None
    assert raised.value.partial.missing_bytes < raised.value.partial.total_bytes


def test_the_pace_is_that_of_the_last_seconds() -> None:
    pace = Pace()
    assert pace.bytes_per_second(100.0, 0) == 0
    for second in range(1, 31):
        rate = pace.bytes_per_second(100.0 + second, second * 2 * MEGABYTE)
    assert rate == 2 * MEGABYTE
    for second in range(31, 61):
        rate = pace.bytes_per_second(100.0 + second, 60 * MEGABYTE)
    assert rate == 0


def test_a_lease_survives_renewals_without_an_answer(new_member: NewMember, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_keeper, "AGAIN_SECONDS", 0.01)
    source = new_member(SEED).serve()
    renew, missed, done = SourceClient.renew, iter(range(5)), []

    def late(client: SourceClient, lease_id: str) -> float:
        if next(missed, None) is not None:
            raise SourceUnreachable("RenewLease: no answer in time")
        done.append(renew(client, lease_id))
        return done[-1]

    monkeypatch.setattr(SourceClient, "renew", late)
    with SourceClient(source, timeout_seconds=60) as client, LeaseKeeper(client, client.prepare()) as keeper:
        wait_for(lambda: done)
        keeper.check()


def test_a_lease_that_is_over_says_so(new_member: NewMember, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_keeper, "AGAIN_SECONDS", 0.01)
    monkeypatch.setattr(lease_keeper, "FIRST_LEASE_SECONDS", 0.1)

    def never(client: SourceClient, lease_id: str) -> float:
        raise SourceUnreachable("RenewLease: no answer in time")

    monkeypatch.setattr(SourceClient, "renew", never)
    source = new_member(SEED).serve()
    with SourceClient(source, timeout_seconds=60) as client, LeaseKeeper(client, client.prepare()) as keeper:

        def over() -> bool:
            try:
                keeper.check()
            except SourceUnreachable:
                return True
            return False

        wait_for(over)


def test_a_full_holder_says_when_to_come_back(new_member: NewMember, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is asked for a lease alone, over one connection; its layout and digests go to whoever has a place."""
    source = new_member(SEED, MX_SOURCE_MAX_READERS=1).serve()
    opened: list[Any] = []
    made = SourceClient.__init__
    monkeypatch.setattr(SourceClient, "__init__", lambda c, *a, **k: (opened.append(c), made(c, *a, **k))[0] and None)
    layouts: list[str] = []
    get = SourceClient.get_layout
    monkeypatch.setattr(SourceClient, "get_layout", lambda c, f: (layouts.append(f), get(c, f))[1])
    prepare, busy = SourceClient.prepare, []

    def counted(client: SourceClient) -> str:
        try:
            return prepare(client)
        except SourceBusy as error:
            busy.append(error.again_seconds)
            if len(busy) == 2:
                first.release(lease)
            raise

    with SourceClient(source, timeout_seconds=60) as first:
        lease = first.prepare()
        monkeypatch.setattr(SourceClient, "prepare", counted)
        del opened[:], layouts[:]
        target = new_member(MX_STALL_TIMEOUT_SECS=600)
        target.receive([source])
    assert busy == [SHORTEST_SECONDS] * 2
    assert (len(opened), len(layouts)) == (1, 1)


def test_many_that_are_refused_come_back_later(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    refused = RefusedReaders()
    pauses = [refused.again_seconds(f"c{number}") for number in range(200)]
    assert pauses == sorted(pauses)
    assert (pauses[0], pauses[-1]) == (SHORTEST_SECONDS, pytest.approx(200 * SECONDS_A_READER))
    assert max(refused.again_seconds(f"c{number}") for number in range(5000)) == LONGEST_SECONDS
    now[0] += LONGEST_SECONDS + 1
    assert refused.again_seconds("c1") == SHORTEST_SECONDS

"""Time-outs follow progress: what arrives is kept, and a holder that is busy for a while keeps its readers."""

from __future__ import annotations

import math
import os
import time
from dataclasses import replace
from typing import Any

import pytest

from mxcore.errors import ChunksMissing, SourceBusy, SourceRefused, SourceUnreachable, TransferError
from mxcore.settings import load_settings
from mxcore.transfer.layout import all_chunks, digest_threads
from mxcore.transfer.move import LeaseKeeper, Source, SourceClient, lease_keeper
from mxcore.transfer.receive import ReceivedChunks, Receiver
from mxcore.transfer.receive.pace import MEGABYTE, Pace
from mxcore.transfer.serve.refused_readers import LONGEST_SECONDS, SECONDS_A_READER, SHORTEST_SECONDS, RefusedReaders
from tests.transfer.conftest import wait_for
from tests.transfer.fleet_member import CHUNK_BYTES, SEED, Member, NewMember
from tests.transfer.test_exchange import Target

HERE = 9  # chunks that a receiver has


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
    monkeypatch.setattr(SourceClient, "get_layout", lambda c, f, k: (layouts.append(f), get(c, f, k))[1])
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


class _Late:
    """A call whose deadline passes."""

    done = True

    def when_done(self, call: Any) -> None:
        call()

    def result(self) -> Any:
        error = SourceUnreachable("AskChunks: DEADLINE_EXCEEDED")
        error.late = True
        raise error


@pytest.mark.parametrize("late", [1, 3])
def test_a_holder_that_answers_late_keeps_its_readers(
    new_member: NewMember, monkeypatch: pytest.MonkeyPatch, late: int
) -> None:
    ask, left = SourceClient.ask, iter(range(late))

    def slow(client: SourceClient, *asked: Any, **how: Any) -> Any:
        return _Late() if next(left, None) is not None else ask(client, *asked, **how)

    monkeypatch.setattr(SourceClient, "ask", slow)
    target = new_member()
    report = target.receive([new_member(SEED).serve()])
    assert target.is_right
    assert not report.failures
    assert next(left, None) is None


def test_a_holder_that_stays_silent_is_left_when_its_lease_is_over(
    new_member: NewMember, monkeypatch: pytest.MonkeyPatch
) -> None:
    def over(keeper: LeaseKeeper) -> None:
        raise SourceUnreachable("RenewLease: no answer in time")

    monkeypatch.setattr(SourceClient, "ask", lambda *asked, **how: _Late())
    monkeypatch.setattr(LeaseKeeper, "check", over)
    with pytest.raises(SourceUnreachable, match="RenewLease"):
        new_member().receive([new_member(SEED).serve()])


def test_a_source_that_is_gone_costs_one_deadline_and_not_the_patience_for_others(new_member: NewMember) -> None:
    gone = Source("source", "gone", 0, "127.0.0.1:1")
    target = Target("tcp", MX_STALL_TIMEOUT_SECS=600, MX_SERVER_TIMEOUT_SECS=0.2)  # two stalls: 20 minutes
    with pytest.raises(TransferError, match="gone"):
        target.receive(gone, find_more=lambda: [gone])  # the server lists it, and nobody else


def _received(member: Member) -> ReceivedChunks:
    return ReceivedChunks(member.layout, member.placement, scalar_names=(), progress=None, chunk_bytes=CHUNK_BYTES)


def test_digests_that_a_receiver_has_are_not_sent_again(new_member: NewMember) -> None:
    target = new_member()
    received, fingerprint = _received(target), target.layout.fingerprint
    with (
        SourceClient(new_member(SEED).serve(), timeout_seconds=60) as first,
        SourceClient(new_member(SEED).serve(), timeout_seconds=60) as second,
        SourceClient(new_member(SEED + 1).serve(), timeout_seconds=60) as other,
    ):
        received.admit("first", first.get_layout(fingerprint))
        assert received.content is not None
        known = received.content.digests
        answer = second.get_layout(fingerprint, known.summary)
        assert (answer.digests, answer.digests_are_known) == (b"", True)
        received.admit("second", answer, known=known)
        with pytest.raises(SourceRefused, match="0 bytes of digests"):
            received.admit("second", answer)  # of which it was not told
        differs = other.get_layout(fingerprint, known.summary)
        assert (differs.digests == known.values, differs.digests_are_known) == (False, False)
        assert len(differs.digests) == len(known.values)


def test_what_was_verified_is_looked_at_again_by_all_cores(
    new_member: NewMember, monkeypatch: pytest.MonkeyPatch
) -> None:
    holder = new_member(SEED)
    received = _received(holder)
    with SourceClient(holder.serve(), timeout_seconds=60) as client:
        received.admit("holder", client.get_layout(holder.layout.fingerprint))
    received.adopt(all_chunks(len(received.chunks)) & ~0b100)
    many, asked = received._digester.many, []

    def counted(*what: Any, threads: int = 1) -> bytes:
        asked.append(threads)
        return many(*what, threads=threads)

    monkeypatch.setattr(received._digester, "many", counted)
    assert received.recheck() == []
    held = holder.membership.holder
    assert held is not None
    begin = held.chunks.segment_starts[1]
    storage = next(s for s in holder.tensors.storages.values() if _holds(s, held.addresses[begin]))
    storage[held.addresses[begin] - int(storage.ctypes.data)] ^= 1
    assert received.recheck() == [1]
    assert received.missing == [1, 2]
    assert asked == [digest_threads()] * 2


def _holds(storage: Any, address: int) -> bool:
    return bool(storage.ctypes.data <= address < storage.ctypes.data + storage.nbytes)


def test_digests_are_made_by_as_many_threads_as_there_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(192)))
    assert digest_threads() == 64  # more are refused


def test_full_holders_that_lack_the_same_are_not_waited_for(new_member: NewMember) -> None:
    """Half is here, the one that gave it has no more, and a full one has the same: both go on, and nothing can come."""
    first, second = new_member(SEED), new_member(SEED, MX_SOURCE_MAX_READERS=1)
    sources = [first.serve(), second.serve()]
    for member in (first, second):
        served = member.membership.holder
        assert served is not None
        served.update(all_chunks(len(served.chunks) // 2))  # the rest never comes
    target = new_member(MX_STALL_TIMEOUT_SECS=3, MX_TRANSFER_TIMEOUT=30)
    with (
        SourceClient(sources[1], timeout_seconds=60) as reader,
        LeaseKeeper(reader, reader.prepare()),
        pytest.raises(ChunksMissing, match="nothing came for 2 stall time-outs") as raised,
    ):
        target.receive([replace(source, receiving=True) for source in sources])
    assert raised.value.partial is not None


@pytest.mark.parametrize(
    ("more", "receiving", "waits"),
    [
        (1, True, True),  # one more than are here, so that it must have something that is missing
        (0, True, False),  # as many: perhaps the same
        (0, False, False),
        (None, False, True),  # of an older release: as the server lists it
        (None, True, False),
    ],
)
def test_a_full_holder_is_waited_for_where_it_has_something(
    new_member: NewMember, more: int | None, receiving: bool, waits: bool
) -> None:
    member, settings = new_member(), load_settings({}, {})
    receiver = Receiver(member.layout, member.placement, settings=settings, worker_id="w", chunk_bytes=CHUNK_BYTES)
    received = receiver._received
    received.adopt(all_chunks(HERE))
    busy = SourceBusy("full")
    busy.again_seconds, busy.had_chunks = 1000.0, None if more is None else HERE + more
    received.news = 0.0
    source = Source("source", "full", 0, "", receiving=receiving)
    receiver._add([source])
    receiver._failed_holder(source, busy, 0.0)
    assert bool(received.news) == waits
    now = received.news + 2 * settings.stall_timeout_seconds
    assert not receiver._nobody_left(now)
    assert receiver._nobody_left(now + 1)  # also where nobody else can be asked for


def test_a_holder_that_gets_more_is_waited_for(new_member: NewMember) -> None:
    """A worker that reads storage and is full: each refusal that tells of more chunks is news, others are not."""
    received = _received(new_member())
    received.adopt(all_chunks(HERE))
    heard = []
    for had in (3, 3, 4, 4, 2, 4, 5):
        received.news = 0.0
        received.full("reads storage", had, until=1.0)
        heard.append(received.news)
    assert heard == [0, 0, 1, 0, 0, 0, 1]


def test_a_holder_without_anything_new_is_no_news(new_member: NewMember) -> None:
    """Workers that lack the same take each other's leases in turn: that is no progress."""
    received = _received(new_member())
    received.adopt(all_chunks(HERE))
    heard = []
    for have in (all_chunks(HERE - 1), all_chunks(HERE), all_chunks(HERE), 1 << HERE):
        received.news = 0.0
        received.join("other", 0)
        received.has("other", have)
        received.drop("other")
        heard.append(bool(received.news))
    assert heard == [False, True, False, True]


def test_a_refusal_tells_how_many_chunks_there_are(new_member: NewMember) -> None:
    holder = new_member(SEED, MX_SOURCE_MAX_READERS=1)
    source = holder.serve()
    served = holder.membership.holder
    assert served is not None
    served.update(all_chunks(3))
    with SourceClient(source, timeout_seconds=60) as client:
        client.prepare()
        with pytest.raises(SourceBusy) as raised:
            client.prepare()
    assert raised.value.had_chunks == 3

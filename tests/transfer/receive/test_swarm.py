"""Many holders, relays and turns: real workers of this process and of others against a real server."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from typing import Any, Literal

import pytest

from mxcore.errors import HolderBusy, NixlError, NixlMissing, SourceUnreachable, TransferError
from mxcore.transfer.layout import ChunkRequest, all_chunks, build_layout
from mxcore.transfer.move import Source
from mxserver.wire import MethodMissing, ServerUnreachable
from mxserver.wire.calls import ServerClient
from mxserver.wire.proto import p2p_pb2
from tests.transfer.conftest import RunningServer, StartWorker, wait_for
from tests.transfer.fleet_member import SEED, NewMember
from tests.transfer.memory import HostTensors


@pytest.fixture
def client(server: RunningServer) -> Iterator[ServerClient]:
    with ServerClient(server.address, timeout_seconds=60) as value:
        yield value


def test_chunks_come_from_several_holders(start_worker: StartWorker, new_member: NewMember) -> None:
    sources = [start_worker("tcp", seed=SEED, megabytes=20).serve() for _ in range(2)]
    target = new_member(megabytes=20)
    report = target.receive(sources)
    assert target.is_right
    assert set(report.bytes_from) == {source.worker_id for source in sources}
    assert sum(report.bytes_from.values()) == report.bytes
    assert report.bytes_again == 0


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_holder_costs_what_was_in_flight(
    start_worker: StartWorker, new_member: NewMember, number: signal.Signals
) -> None:
    lost = start_worker("tcp", seed=SEED, megabytes=20)
    sources = [lost.serve(), start_worker("tcp", seed=SEED, megabytes=20).serve()]
    target = new_member(megabytes=20, MX_STALL_TIMEOUT_SECS=4)
    struck = threading.Event()

    def progress(done: int, total: int) -> None:
        if done > total / 3 and not struck.is_set():
            struck.set()
            lost.kill(number)

    report = target.receive(sources, progress)
    assert target.is_right
    assert report.bytes_again <= 0.1 * report.bytes


@pytest.mark.parametrize("kind", ["raw", "processed"])
def test_what_came_in_part_is_finished_from_a_holder_that_came_later(
    kind: Literal["raw", "processed"], start_worker: StartWorker, new_member: NewMember
) -> None:
    """The first one is killed at half, and nobody else was there; what came of it is not asked for again."""
    settings = {"MX_SOURCE_RATE_LIMIT": "8 MB"}
    dying, later, target = start_worker("tcp", seed=SEED, kind=kind, settings=settings), new_member(SEED), new_member()
    for member in (later, target):
        member.layout, member.placement = build_layout(kind, member.tensors.local_tensors())
    source, half = dying.serve(), threading.Event()

    def replaced() -> None:
        assert half.wait(60)
        dying.kill()
        later.serve()

    replacing = threading.Thread(target=replaced)
    replacing.start()
    target.membership.join()
    report = target.receive([source], lambda done, total: half.set() if done >= total / 2 else None)
    replacing.join()
    assert target.is_right
    assert report.bytes_from.keys() == {source.worker_id, later.membership.worker_id}
    assert sum(report.bytes_from.values()) == report.bytes
    assert report.bytes_from[source.worker_id] >= report.bytes / 2


def test_a_receiver_gives_away_what_it_has(new_member: NewMember, client: ServerClient) -> None:
    seed, first, second = new_member(SEED, MX_SOURCE_MAX_READERS=1), new_member(), new_member()
    source = seed.serve()
    half, relayed = threading.Event(), threading.Event()

    def hold(done: int, total: int) -> None:
        if done >= total / 2:
            half.set()
            assert relayed.wait(60)

    first.membership.join()
    receiving = threading.Thread(target=first.receive, args=([source], hold))
    receiving.start()
    assert half.wait(60)
    listed = second.membership
    [relay] = wait_for(lambda: [found for found in listed.find_sources(receiving=True) if found.receiving])
    assert relay.worker_id == first.membership.worker_id
    assert [found.worker_id for found in second.membership.find_sources()] == [source.worker_id]  # READY only
    second.membership.join()
    got: list[int] = []

    def note(done: int, total: int) -> None:
        got.append(done)
        relayed.set()  # the first one is still at half: this came from it, as the seed takes one reader only

    report = second.receive([relay], note)
    receiving.join()
    assert second.is_right
    assert first.is_right
    assert report.bytes_from[first.membership.worker_id] > 0
    first.serve(None)
    assert first.membership.holder is not None
    assert first.membership.holder.complete


def test_a_relay_becomes_a_source_without_a_second_holder(new_member: NewMember) -> None:
    seed, target = new_member(SEED), new_member()
    source = seed.serve()
    target.membership.join()
    report = target.receive([source])
    relay = target.membership.holder
    served = target.serve(report)
    if relay is not None:
        assert target.membership.holder is relay
    third = new_member()
    assert third.receive([served]).source_worker_id == served.worker_id
    assert third.is_right


def test_after_a_failure_nothing_is_served(start_worker: StartWorker, new_member: NewMember) -> None:
    dying = start_worker("tcp", seed=SEED, megabytes=20)
    target = new_member(megabytes=20, MX_STALL_TIMEOUT_SECS=2)
    target.membership.join()
    with pytest.raises(TransferError):
        target.receive([dying.serve()], lambda done, total: dying.kill())
    assert target.membership.holder is None
    assert target.membership.endpoint is None


def test_without_nixl_each_holder_is_tried_once(
    new_member: NewMember, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What is missing is missing here: asking again helps nobody, and fills the log."""
    monkeypatch.setattr("mxcore.transfer.receive.tried_holders._AGAIN_SECONDS", 0.1)
    source = new_member(SEED).serve()
    alone = new_member(MX_NIXL_BACKEND="NOPE", MX_TCP_TRANSFER="nixl", MX_STALL_TIMEOUT_SECS=1)
    alone.membership.join()
    with pytest.raises(NixlMissing, match="NOPE"):
        alone.receive([source])
    assert caplog.text.count("gives no (more) weights") == 1


def test_without_nixl_weights_come_over_tcp_all_the_same(new_member: NewMember) -> None:
    source, target = new_member(SEED).serve(), new_member(MX_NIXL_BACKEND="NOPE")
    target.membership.join()
    assert target.receive([source]).operation == "send"
    assert target.is_right


def test_one_of_many_reads_storage(new_member: NewMember) -> None:
    members = [new_member() for _ in range(4)]
    found: dict[int, list[Source]] = {}

    def start(number: int) -> None:
        members[number].membership.join()
        found[number] = members[number].membership.wait_for_source()

    threads = [threading.Thread(target=start, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    [reader] = wait_for(lambda: [number for number, sources in found.items() if not sources])
    assert list(found) == [reader]
    for name, storage in HostTensors(members[reader].tensors.specs, SEED).storages.items():
        members[reader].tensors.storages[name][:] = storage
    members[reader].serve()
    for thread in threads:
        thread.join()
    for number, sources in found.items():
        if number != reader:
            assert [source.worker_id for source in sources] == [members[reader].membership.worker_id]


def test_a_reader_that_cannot_share_lets_all_go(new_member: NewMember) -> None:
    first, second = new_member(), new_member()
    assert first.membership.wait_for_source() == []
    first.membership.close()
    assert second.membership.wait_for_source() == []


@pytest.mark.parametrize("failures", [1, 3])
def test_sources_that_cannot_be_listed_for_a_moment_are_waited_for(
    new_member: NewMember, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, failures: int
) -> None:
    """A call that timed out, or a store that was away, says nothing of who has weights: no reason to read storage."""
    seed, late = new_member(SEED), new_member()
    served = seed.serve()
    late.membership.join()
    listed = ServerClient.list_sources
    left = iter(range(failures))

    def no_stream(self: ServerClient, *args: Any) -> Any:
        raise MethodMissing("WatchSources: an older server, so that sources are listed")

    def failing(self: ServerClient, *args: Any, **kwargs: Any) -> Any:
        if next(left, None) is not None:
            raise ServerUnreachable("ListSources: no answer within 3 s")
        return listed(self, *args, **kwargs)

    monkeypatch.setattr(ServerClient, "list_sources", failing)
    monkeypatch.setattr(ServerClient, "watch_sources", no_stream)
    assert [source.worker_id for source in late.membership.wait_for_source()] == [served.worker_id]
    assert "come from storage" not in caplog.text
    assert caplog.text.count("the server is waited for") == 1


def test_a_server_that_stays_away_is_not_waited_for_long(
    new_member: NewMember, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    alone = new_member()
    alone.membership.join()
    monkeypatch.setattr("mxcore.transfer.member.source_wait._SERVER_AWAY_SECONDS", 1.0)

    def away(self: ServerClient, *args: Any, **kwargs: Any) -> Any:
        raise ServerUnreachable("no answer within 3 s")

    monkeypatch.setattr(ServerClient, "list_sources", away)
    monkeypatch.setattr(ServerClient, "take_storage_turn", away)
    assert alone.membership.wait_for_source() == []
    assert caplog.text.count("come from storage") == 1


def test_waiting_ends(new_member: NewMember) -> None:
    first, second = new_member(), new_member(MX_SOURCE_WAIT_SECS=0.3)
    assert first.membership.wait_for_source() == []
    assert second.membership.wait_for_source() == []


def test_a_turn_can_be_handed_over(new_member: NewMember) -> None:
    first, successor, other = new_member(), new_member(SEED), new_member(MX_SOURCE_WAIT_SECS=0.3)
    assert first.membership.wait_for_source() == []
    successor.membership.take_over_election(first.membership)
    first.membership.close()
    served = successor.serve()
    assert [source.worker_id for source in other.membership.wait_for_source()] == [served.worker_id]
    assert other.membership.wait_for_source(avoid=[served.worker_id]) == []


def test_a_source_takes_so_many_readers(new_member: NewMember) -> None:
    seed = new_member(SEED, MX_SOURCE_MAX_READERS=1)
    source = seed.serve()
    holder = seed.membership.holder
    assert holder is not None
    lease = holder.grant()
    with pytest.raises(HolderBusy):
        holder.grant()
    target = new_member()
    done = threading.Thread(target=target.receive, args=([source],))
    done.start()
    holder.release(lease.lease_id)  # it asked in vain, or will find room at once
    done.join()
    assert target.is_right


def test_withdrawing_waits_for_readers_and_frees_memory(new_member: NewMember, client: ServerClient) -> None:
    seed = new_member(SEED)
    source = seed.serve()
    holder = seed.membership.holder
    assert holder is not None
    lease = holder.grant()
    assert not seed.membership.withdraw(0.1)
    with pytest.raises(NixlError, match="stopped serving"):
        holder.agent.session()
    assert seed.membership.endpoint is None
    record = client.get_metadata(source.source_id, source.worker_id)
    assert record is not None
    assert record.worker.status == p2p_pb2.SOURCE_STATUS_INITIALIZING
    assert seed.membership.withdraw()
    again = seed.serve()
    assert new_member().receive([again]).bytes > 0
    assert lease.ended


def test_a_worker_that_slept_serves_again(new_member: NewMember) -> None:
    """What sleep and reload do: other workers see it go, and come back with other weights at another port."""
    seed, other = new_member(1), new_member()
    before = seed.serve()
    assert [source.endpoint for source in other.membership.find_sources()] == [before.endpoint]
    assert seed.membership.withdraw()
    assert seed.membership.withdraw()  # nothing is served any more: nothing to do
    assert other.membership.find_sources(receiving=True) == []
    with pytest.raises(TransferError):
        other.receive([before])
    for name, storage in HostTensors(seed.tensors.specs, SEED).storages.items():
        seed.tensors.storages[name][:] = storage
    again = seed.serve()
    assert again.worker_id == before.worker_id
    [found] = wait_for(other.membership.find_sources)
    assert found.endpoint == again.endpoint
    assert other.receive([found]).source_worker_id == seed.membership.worker_id
    assert other.is_right


def test_a_withdrawing_worker_refuses_new_readers_and_lets_the_others_end(new_member: NewMember) -> None:
    seed, target, late = new_member(SEED), new_member(), new_member()
    source = seed.serve()
    first_chunk, go_on = threading.Event(), threading.Event()

    def hold(done: int, total: int) -> None:
        first_chunk.set()
        assert go_on.wait(60)

    reading = threading.Thread(target=target.receive, args=([source], hold))
    reading.start()
    assert first_chunk.wait(60)
    drained: list[bool] = []
    withdrawing = threading.Thread(target=lambda: drained.append(seed.membership.withdraw(60)))
    withdrawing.start()
    holder = seed.membership.holder
    assert holder is not None
    wait_for(lambda: holder.draining)
    with pytest.raises(SourceUnreachable, match="UNAVAILABLE"):
        late.receive([source])
    assert holder.live_leases == 1  # somebody reads, and goes on
    go_on.set()
    reading.join()
    withdrawing.join()
    assert drained == [True]
    assert target.is_right
    assert seed.membership.holder is None


def test_news_of_a_holder_and_chunks_that_are_not_there(new_member: NewMember) -> None:
    seed = new_member(SEED)
    seed.serve()
    holder = seed.membership.holder
    assert holder is not None
    count = len(holder.chunks)
    holder.update(0b101)
    lease = holder.grant()
    answer = holder.ask(lease.lease_id, ChunkRequest(all_chunks(count), 0, count), 0)
    assert sorted(answer.granted) == [0, 2]
    assert not answer.complete
    waiting = threading.Timer(0.05, holder.update, args=(all_chunks(count),))
    waiting.start()
    news = holder.ask(lease.lease_id, ChunkRequest(0b10, 0, 1), answer.version, wait_seconds=30)
    waiting.join()
    assert (news.granted, news.complete) == ([1], True)
    holder.update(0b101)
    with pytest.raises(ValueError, match="are not here"):
        next(holder.push(lease.lease_id, [1], lambda: False))


def test_who_begins_to_serve_is_heard_of_at_once(new_member: NewMember, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server tells it on the stream: nobody waits until it is time to look for others again."""
    for name in ("_FIRST_FIND_SECONDS", "_FIND_SECONDS"):
        monkeypatch.setattr(f"mxcore.transfer.receive.holder_search.{name}", 600.0)
    half, late, target = new_member(SEED), new_member(SEED), new_member(MX_STALL_TIMEOUT_SECS=600)
    source = half.serve()
    served = half.membership.holder
    assert served is not None
    served.update(all_chunks(len(served.chunks) // 2))  # the rest never comes
    target.membership.join()
    begun = threading.Event()
    receiving = threading.Thread(target=lambda: target.receive([source], lambda done, total: begun.set()))
    receiving.start()
    assert begun.wait(60)
    late.serve()
    receiving.join(60)
    assert not receiving.is_alive()
    assert target.is_right

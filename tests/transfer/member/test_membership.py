"""A worker's life against a real mxserver, with workers in other processes and in this one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from mxcore.errors import TransferError
from mxcore.settings import load_settings
from mxcore.transfer.layout import ChunkDigests, build_layout, chunk_digests
from mxcore.transfer.member import Membership
from mxserver.wire import ServerUnreachable
from mxserver.wire.calls import ServerClient
from mxserver.wire.proto import mx_pb2, p2p_pb2
from tests.transfer.conftest import RunningServer, ServerProcess, StartWorker, wait_for
from tests.transfer.memory import HostTensors, identity, model_specs

SEED = 7
NewMember = Callable[..., Membership]


@pytest.fixture
def new_member(server: RunningServer) -> Iterator[NewMember]:
    members: list[Membership] = []

    def make(checkpoint: str = "c0ffee", rank: int = 0, signed: str = "", **changes: Any) -> Membership:
        names = {"MX_SERVER_ADDRESS": server.address, "MX_WORKER_GRPC_PORT": 0, "MX_TRANSPORT": "tcp"}
        names |= {"MX_HEARTBEAT_INTERVAL_SECS": 0.05, "MX_SERVER_TIMEOUT_SECS": 60, "MX_DRAIN_TIMEOUT_SECS": 5}
        settings = load_settings({**names, **changes}, {})
        members.append(
            Membership(settings, identity(checkpoint), rank, "cpu", chunk_bytes=65536, signed_manifest=signed)
        )
        return members[-1]

    yield make
    for member in members:
        member.close()


@pytest.fixture
def client(server: RunningServer) -> Iterator[ServerClient]:
    with ServerClient(server.address, timeout_seconds=60) as value:
        yield value


def serve(member: Membership, seed: int = SEED) -> HostTensors:
    tensors = HostTensors(model_specs(1), seed)
    layout, placement = build_layout("raw", tensors.local_tensors())
    member.serve(layout, placement, {}, keep_alive=tensors)
    return tensors


def record_of(client: ServerClient, member: Membership) -> p2p_pb2.GetMetadataResponse | None:
    try:
        return client.get_metadata(member.source_id, member.worker_id)
    except ServerUnreachable:
        return None


def status_of(client: ServerClient, member: Membership) -> int | None:
    record = record_of(client, member)
    return record.worker.status if record is not None else None


def test_what_the_nearest_worker_has_else(new_member: NewMember) -> None:
    ours = new_member("c0ffee")
    assert ours.differs_least() == ""
    far, near = new_member("decaf"), new_member("decaf")
    far.identity.dtype = "float64"
    for member in (far, near):
        member.join()
        serve(member)
    assert ours.differs_least() == f"worker {near.worker_id} has other weight files"
    near.close()
    here = ours.identity.dtype
    assert ours.differs_least() == f"worker {far.worker_id} has other weight files, dtype float64 (here {here})"


def test_from_joining_to_goodbye(new_member: NewMember, client: ServerClient) -> None:
    source, target = new_member(), new_member()
    assert source.join()
    assert source.join()
    assert status_of(client, source) == p2p_pb2.SOURCE_STATUS_INITIALIZING
    assert target.find_sources() == []
    serve(source)
    record = record_of(client, source)
    assert record is not None
    assert record.worker.status == p2p_pb2.SOURCE_STATUS_READY
    assert record.worker.worker_grpc_endpoint == source.endpoint
    assert record.worker.digest_origin == mx_pb2.DIGEST_ORIGIN_READ
    assert source.endpoint is not None
    assert source.endpoint.startswith("127.0.0.1:")

    [found] = target.find_sources()
    assert (found.worker_id, found.endpoint) == (source.worker_id, source.endpoint)
    tensors = HostTensors(model_specs(1), None)
    layout, placement = build_layout("raw", tensors.local_tensors())
    report = target.receive(layout, placement, {}, [found])
    assert tensors.equal_bytes(HostTensors(model_specs(1), SEED))

    target.serve(layout, placement, {}, digests=report.digests, keep_alive=tensors)
    third = new_member()
    assert {s.worker_id for s in third.find_sources()} == {source.worker_id, target.worker_id}
    assert [s.worker_id for s in source.find_sources()] == [target.worker_id]  # never itself
    source.close()
    source.close()
    assert status_of(client, source) == p2p_pb2.SOURCE_STATUS_STALE
    assert [s.worker_id for s in third.find_sources()] == [target.worker_id]
    again = HostTensors(model_specs(1), None)
    layout, placement = build_layout("raw", again.local_tensors())
    assert third.receive(layout, placement, {}, third.find_sources()).source_worker_id == target.worker_id
    assert again.equal_bytes(tensors)  # what was received is served on, with the first holder's digests


def test_heartbeats_go_on_while_a_model_is_hashed(new_member: NewMember, monkeypatch: pytest.MonkeyPatch) -> None:
    member, beats = new_member(), [0]
    member.join()
    client: Any = member._client
    update = client.update_status

    def counted(*told: Any, **more: Any) -> Any:
        answer = update(*told, **more)
        beats[0] += 1
        return answer

    def slowly(*what: Any, **how: Any) -> ChunkDigests:
        before = beats[0]
        wait_for(lambda: beats[0] >= before + 2)
        return chunk_digests(*what, **how)

    monkeypatch.setattr(client, "update_status", counted)
    monkeypatch.setattr("mxcore.transfer.serve.holder.chunk_digests", slowly)
    serve(member)
    assert member.published


def test_a_worker_that_leaves_while_its_model_is_hashed_serves_nothing(
    new_member: NewMember, monkeypatch: pytest.MonkeyPatch
) -> None:
    member = new_member()
    member.join()

    def leaving(*what: Any, **how: Any) -> ChunkDigests:
        member.close()
        return chunk_digests(*what, **how)

    monkeypatch.setattr("mxcore.transfer.serve.holder.chunk_digests", leaving)
    with pytest.raises(TransferError, match="has left"):
        serve(member)
    assert (member.holder, member.endpoint) == (None, None)


def test_only_the_same_rank_and_identity_are_sources(new_member: NewMember) -> None:
    serve(new_member(rank=1))
    serve(new_member("another checkpoint"))
    assert new_member().find_sources() == []
    assert len(new_member(rank=1).find_sources()) == 1


def test_ranks_that_are_there_and_ranks_that_are_ready(new_member: NewMember) -> None:
    serve(new_member(rank=0))
    new_member(rank=1).join()
    serve(new_member("another checkpoint", rank=2))
    asked = new_member(rank=3)
    assert asked.published_ranks(ready=True) == {0}
    assert asked.published_ranks(ready=False) == {0, 1}


def test_serving_twice_or_after_leaving_is_refused(new_member: NewMember) -> None:
    member = new_member()
    serve(member)
    with pytest.raises(TransferError, match="serving already"):
        serve(member)
    member.close()
    with pytest.raises(TransferError, match="has left"):
        serve(member)


def test_a_worker_without_weight_files_adopts_the_checkpoint(new_member: NewMember, client: ServerClient) -> None:
    source = new_member()
    serve(source)
    joined = new_member("")
    joined.join()
    before = joined.source_id
    assert joined.find_sources() == []
    assert [s.worker_id for s in joined.find_sources(match_any_checkpoint=True)] == [source.worker_id]
    assert joined.identity == source.identity
    assert status_of(client, joined) == p2p_pb2.SOURCE_STATUS_INITIALIZING
    old = client.get_metadata(before, joined.worker_id)
    assert old is None or old.worker.status == p2p_pb2.SOURCE_STATUS_STALE
    assert len(joined.find_sources()) == 1


def test_two_checkpoints_are_one_too_many_to_choose_from(
    new_member: NewMember, caplog: pytest.LogCaptureFixture
) -> None:
    serve(new_member("one"))
    serve(new_member("two"))
    blind = new_member("")
    for _ in range(2):  # a target looks every second
        assert blind.find_sources(match_any_checkpoint=True) == []
    assert caplog.text.count("2 different checkpoints (one, two)") == 1
    assert blind.identity == identity("")
    serve(new_member("three"))
    assert blind.find_sources(match_any_checkpoint=True) == []
    assert caplog.text.count("different checkpoints") == 2


def test_a_source_of_another_kind_is_not_adopted(new_member: NewMember) -> None:
    serve(new_member())
    blind = new_member("")
    blind.identity.dtype = "float32"
    assert blind.find_sources(match_any_checkpoint=True) == []


def test_heartbeats_keep_a_worker_known(new_member: NewMember, client: ServerClient) -> None:
    member = new_member()
    member.join()
    first = record_of(client, member)
    assert first is not None

    def newer() -> bool:
        record = record_of(client, member)
        return record is not None and record.worker.updated_at > first.worker.updated_at

    wait_for(newer)


@pytest.mark.parametrize("lose_state", [False, True])
def test_a_worker_survives_the_server(
    new_member: NewMember, client: ServerClient, server_process: ServerProcess, lose_state: bool
) -> None:
    member = new_member()
    serve(member)
    server_process.stop()
    member.join()
    server_process.restart(lose_state=lose_state)
    wait_for(lambda: status_of(client, member) == p2p_pb2.SOURCE_STATUS_READY)
    record = record_of(client, member)
    assert record is not None
    assert record.worker.worker_grpc_endpoint == member.endpoint


def test_an_unreachable_server_costs_a_warning(server_process: ServerProcess, caplog: pytest.LogCaptureFixture) -> None:
    server_process.stop()
    settings = load_settings({"MX_SERVER_ADDRESS": server_process.address, "MX_SERVER_TIMEOUT_SECS": 1}, {})
    member = Membership(settings, identity(), 0, "cpu", chunk_bytes=65536)
    assert not member.join()
    assert [member.find_sources(), member.find_sources(receiving=True)] == [[], []]
    assert "not known to the server yet" in caplog.text
    assert caplog.text.count("sources cannot be listed") == 1  # of a worker that waits for a source: not at each look
    member.close()


def test_without_a_server_nothing_is_found(caplog: pytest.LogCaptureFixture) -> None:
    member = Membership(load_settings({}, {}), identity(), 0, "cpu")
    assert not member.join()
    assert member.find_sources() == []
    assert "no server is set" in caplog.text
    assert member.drain()
    member.close()
    member.close()


def test_a_newer_life_takes_over(new_member: NewMember, client: ServerClient, caplog: pytest.LogCaptureFixture) -> None:
    member = new_member()
    serve(member)
    worker = p2p_pb2.WorkerMetadata(worker_rank=0, status=p2p_pb2.SOURCE_STATUS_READY, worker_grpc_endpoint="h:1")
    client.publish(identity(), worker, member.worker_id)
    wait_for(lambda: member.superseded and member.endpoint is None)
    assert "has taken over" in caplog.text
    member.close()
    assert status_of(client, member) == p2p_pb2.SOURCE_STATUS_READY  # the newer one's record is left alone


def test_a_reader_is_waited_for(new_member: NewMember, start_worker: StartWorker) -> None:
    member = new_member()
    serve(member)
    reader = start_worker("tcp", megabytes=1)
    [source] = new_member().find_sources()
    paused = reader.ask(do="receive", sources=[vars(source)], pause_after_bytes=1)
    assert "paused_at" in paused
    assert not member.drain(0)
    reader.send(do="go on")
    assert reader.read()["equal"]
    assert member.drain(30)


def test_a_closing_member_never_raises(new_member: NewMember, server_process: ServerProcess) -> None:
    member = new_member()
    serve(member)
    server_process.stop()
    member.close()
    assert member.endpoint is None


def test_with_a_signed_manifest_those_alone_are_taken_from_whose_record_names_it(
    new_member: NewMember, client: ServerClient, caplog: pytest.LogCaptureFixture
) -> None:
    target, trusted = new_member(signed="a" * 64), new_member(signed="a" * 64)
    others = [new_member(), new_member(signed="b" * 64)]
    for member in (*others, trusted):
        serve(member)
    assert wait_for(lambda: len(client.list_sources(trusted.identity, status=p2p_pb2.SOURCE_STATUS_READY)) == 3)
    record = record_of(client, trusted)
    assert record is not None
    assert record.worker.signed_manifest == "a" * 64
    for _ in range(2):
        assert [source.worker_id for source in target.find_sources(receiving=True)] == [trusted.worker_id]
    refused = [line for entry in caplog.records if "is refused" in (line := entry.getMessage())]
    assert len(refused) == 2
    assert all(any(member.worker_id in line for line in refused) for member in others)
    assert {source.worker_id for source in others[0].find_sources()} == {others[1].worker_id, trusted.worker_id}

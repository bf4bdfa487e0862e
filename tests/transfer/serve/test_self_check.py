"""A worker that looks at its own weights: in this process with a holder alone, then whole workers."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from mxcore.errors import ChunksMissing
from mxcore.transfer.move import Source, SourceClient
from mxcore.transfer.serve import Holder, SelfCheck
from mxcore.transfer.serve.self_check import pause_after
from mxserver.wire.calls import ServerClient
from mxserver.wire.proto import mx_pb2, p2p_pb2
from tests.transfer.conftest import ServerProcess, StartWorker, wait_for
from tests.transfer.fleet_member import SEED, NewMember
from tests.transfer.memory import identity
from tests.transfer.serve.test_holder import SOURCE_ID, WORKER_ID, holder, new_server

__all__ = ["holder"]  # a fixture


@pytest.fixture
def flipped(holder: Holder) -> Iterator[int]:
    """A chunk in the middle with one bit flipped."""
    chunk = len(holder.chunks) // 2
    byte = ctypes.c_uint8.from_address(holder.chunks.slice_of(holder.addresses, chunk)[0])
    byte.value ^= 4
    yield chunk
    byte.value ^= 4


def test_a_flipped_bit_is_found(holder: Holder, flipped: int) -> None:
    found: list[list[int]] = []
    check = SelfCheck(holder, lambda chunks: found.append(list(chunks)))
    check.start()
    assert wait_for(lambda: found) == [[flipped]]
    check.stop()


def test_what_is_right_stays_right(holder: Holder) -> None:
    assert holder.wrong_chunks(0, len(holder.chunks)) == []
    assert holder.wrong_chunks(3, 4) == []


def test_a_doubted_chunk_is_looked_at_at_once(holder: Holder, flipped: int) -> None:
    found: list[list[int]] = []
    check = SelfCheck(holder, lambda chunks: found.append(list(chunks)), share=1e-12)
    check._next = flipped + 1  # at this share the check would not come round to it in a lifetime
    check.doubt([len(holder.chunks), flipped])  # the first is no chunk
    check.start()
    assert wait_for(lambda: found) == [[flipped]]
    check.stop()


def test_one_doubt_is_looked_at_at_once_and_the_next_one_waits(holder: Holder, flipped: int) -> None:
    found: list[object] = []
    check = SelfCheck(holder, found.append, share=1e-12)
    check._next = flipped + 1
    check.doubt([flipped, flipped - 1])  # the last one is taken first, and is right
    check.start()
    wait_for(lambda: len(check._doubted) == 1)
    check.stop()
    assert (found, list(check._doubted)) == ([], [flipped])


@pytest.mark.parametrize("spent_seconds", [1e-6, 0.002, 0.1, 30.0])
def test_work_is_at_most_its_share_of_the_time(spent_seconds: float) -> None:
    pause_seconds = pause_after(spent_seconds, 0.01)
    assert spent_seconds / (spent_seconds + pause_seconds) <= 0.01 + 1e-12
    assert pause_seconds <= max(0.25, 99 * spent_seconds)


def test_a_holder_hears_of_chunks_that_a_reader_refused(holder: Holder) -> None:
    told: list[int] = []
    server = new_server(holder, doubted=told.extend)
    source = Source(SOURCE_ID, WORKER_ID, 3, server.endpoint)
    with SourceClient(source, timeout_seconds=60) as client:
        client.doubt("no lease", [1])
        client.doubt(client.prepare(), [2, 5])
        assert wait_for(lambda: told) == [2, 5]
    server.stop()


def test_a_receiver_tells_holder_and_server_of_wrong_chunks(
    new_member: NewMember, server: ServerProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[int] = []
    monkeypatch.setattr(SelfCheck, "start", lambda check: None)  # else the holder may be the first to notice
    monkeypatch.setattr(SelfCheck, "doubt", lambda check, chunks: told.extend(chunks))
    seed, target = new_member(SEED), new_member()
    source = seed.serve()
    target.membership.join()
    for name in ("layer0", "layer3"):
        seed.tensors.storages[name][5] ^= 1
    with pytest.raises(ChunksMissing):
        target.receive([source])
    assert len(set(wait_for(lambda: told if len(told) == 2 else []))) == 2
    with ServerClient(server.address) as client:
        [doubt] = wait_for(client.doubts)
    assert (doubt.kind, doubt.worker_id, list(doubt.holders)) == (
        mx_pb2.DOUBT_KIND_WRONG_CHUNKS,
        target.membership.worker_id,
        [source.worker_id],
    )


def test_a_worker_whose_memory_changes_withdraws_and_is_not_well(
    server: ServerProcess, start_worker: StartWorker
) -> None:
    worker = start_worker("tcp", seed=SEED, settings={"MX_SERVER_ADDRESS": server.address})
    source = worker.serve()
    with ServerClient(server.address) as client, grpc.insecure_channel(source.endpoint) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        assert health.Check(health_pb2.HealthCheckRequest()).status == health_pb2.HealthCheckResponse.SERVING
        worker.ask(do="flip", storage="embed", offset=70_001)
        [doubt] = wait_for(client.doubts)
        assert (doubt.kind, doubt.worker_id, doubt.chunks) == (
            mx_pb2.DOUBT_KIND_OWN_MEMORY,
            source.worker_id,
            1,
        )
        assert client.list_sources(identity(), status=p2p_pb2.SOURCE_STATUS_READY) == []
        assert health.Check(health_pb2.HealthCheckRequest()).status == health_pb2.HealthCheckResponse.NOT_SERVING
    assert worker.ask(do="cpu")["process_seconds"] > 0  # the process goes on
    assert worker.ask(do="close") == {"agents": 0}


def test_digests_that_never_end_keep_the_memory(holder: Holder, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[object] = []
    begun, go_on = threading.Event(), threading.Event()

    def stuck(first: int, end: int) -> list[int]:
        begun.set()
        assert go_on.wait(60)
        return []

    monkeypatch.setattr(holder, "wrong_chunks", stuck)
    monkeypatch.setattr(holder, "never_free", lambda: kept.append(holder))
    check = SelfCheck(holder, lambda chunks: None)
    check._longest_seconds = 0.05
    check.start()
    assert begun.wait(60)
    check.stop()
    assert kept == [holder]
    go_on.set()
    check.stop()

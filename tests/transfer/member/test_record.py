"""A worker's record at a real mxserver, alone: what is published when, and what heartbeats do about it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from mxcore.transfer.member.heartbeat import Heartbeat
from mxcore.transfer.member.record import Names, Served, WorkerRecord
from mxserver.wire import StaleEpoch, WireError
from mxserver.wire.calls import ServerClient
from mxserver.wire.proto import p2p_pb2
from tests.transfer.conftest import RunningServer, wait_for
from tests.transfer.memory import identity

WORKER, RANK = "w0", 3
NEVER_SECONDS = 3600.0
INITIALIZING, READY, STALE = (
    p2p_pb2.SOURCE_STATUS_INITIALIZING,
    p2p_pb2.SOURCE_STATUS_READY,
    p2p_pb2.SOURCE_STATUS_STALE,
)


class Kept:
    """A record with what it is asked to tell, and the client to look at it."""

    def __init__(
        self, client: ServerClient | None, interval_seconds: float, names: Callable[[], Names] = Names
    ) -> None:
        self.client = client
        self.served = Served()
        self.superseded = threading.Event()
        self.record = WorkerRecord(
            client,
            identity(),
            WORKER,
            RANK,
            "cpu",
            heartbeat_interval_seconds=interval_seconds,
            served=lambda: self.served,
            topology=dict,
            superseded_by_newer=self.superseded.set,
            names=names,
        )

    def written(self, source_id: str | None = None) -> p2p_pb2.WorkerMetadata:
        """What the server has; its rank tells whether it has any."""
        assert self.client is not None
        answer = self.client.get_metadata(source_id or self.record.source_id, WORKER)
        return answer.worker if answer is not None else p2p_pb2.WorkerMetadata()


NewRecord = Callable[[float], Kept]


@pytest.fixture
def new_record(server: RunningServer) -> Iterator[NewRecord]:
    made: list[Kept] = []
    with ServerClient(server.address, timeout_seconds=5) as client:

        def make(interval_seconds: float) -> Kept:
            made.append(Kept(client, interval_seconds))
            return made[-1]

        yield make
        for kept in made:
            kept.record.end()


def test_the_record_says_what_is_served(new_record: NewRecord) -> None:
    kept = new_record(NEVER_SECONDS)
    record = kept.record
    assert not record.published
    assert record.keep()
    assert (kept.written().status, kept.written().worker_grpc_endpoint) == (INITIALIZING, "")
    kept.served = Served("agent-1", "127.0.0.1:7000", 2)
    record.mark_ready()
    assert (record.ready, record.published) == (True, False)
    assert kept.written().status == INITIALIZING  # until it is published
    record.keep()
    written = kept.written()
    assert (written.status, written.agent_name, written.worker_grpc_endpoint) == (READY, "agent-1", "127.0.0.1:7000")
    assert (written.worker_rank, written.accelerator) == (RANK, "cpu")
    record.unmark_ready()
    assert record.mark_changed()
    assert not record.mark_changed()
    record.publish()
    assert kept.written().status == INITIALIZING
    record.goodbye()
    record.goodbye()
    assert kept.written().status == STALE


def test_the_record_says_where_people_find_the_worker(server: RunningServer) -> None:
    with ServerClient(server.address, timeout_seconds=5) as client:
        kept = Kept(client, NEVER_SECONDS, lambda: Names("llama-7d9c", "gpu-a-03", "engine-1"))
        kept.record.keep()
        written = kept.written()
        kept.record.end()
    assert (written.pod_name, written.node_name, written.replica) == ("llama-7d9c", "gpu-a-03", "engine-1")


def test_an_outdated_record_is_published_by_the_next_heartbeat(new_record: NewRecord) -> None:
    kept = new_record(0.05)
    kept.record.keep()
    kept.served = Served("agent-2", "127.0.0.1:7001", 0)
    kept.record.mark_changed()
    wait_for(lambda: kept.written().worker_grpc_endpoint == "127.0.0.1:7001")
    wait_for(lambda: kept.record.published)


def test_another_identity_is_another_record(new_record: NewRecord) -> None:
    kept = new_record(NEVER_SECONDS)
    record = kept.record
    before = record.source_id
    record.change_identity(identity("not published yet"))
    assert kept.written(record.source_id).status == 0  # nothing there
    record.change_identity(identity())
    assert record.source_id == before
    record.keep()
    record.change_identity(identity("another"))
    assert kept.written(before).status == STALE
    assert kept.written().status == INITIALIZING


def test_a_record_that_a_newer_life_took_over_is_left_alone(new_record: NewRecord) -> None:
    kept = new_record(0.05)
    kept.record.keep()
    newer = p2p_pb2.WorkerMetadata(worker_rank=RANK, status=READY, worker_grpc_endpoint="newer:1")
    assert kept.client is not None
    kept.client.publish(identity(), newer, WORKER)
    assert kept.superseded.wait(60)
    assert kept.record.superseded
    kept.record.publish()
    kept.record.goodbye()
    assert (kept.written().status, kept.written().worker_grpc_endpoint) == (READY, "newer:1")


def test_publishing_with_an_old_epoch_is_told(new_record: NewRecord) -> None:
    older, newer = new_record(NEVER_SECONDS), new_record(NEVER_SECONDS)
    older.record.publish()
    newer.record.publish()
    with pytest.raises(StaleEpoch):
        older.record.publish()
    assert not older.superseded.is_set()  # that is for the heartbeat to find


def test_without_a_server_nothing_is_published() -> None:
    kept = Kept(None, NEVER_SECONDS)
    assert not kept.record.keep()
    kept.record.mark_ready()
    kept.record.publish()
    kept.record.goodbye()
    assert not kept.record.published
    kept.record.end()


def test_a_heartbeat_is_never_longer_than_a_third_of_the_lease() -> None:
    heartbeat = Heartbeat(30, lambda: None)
    heartbeat.limit(0)
    assert heartbeat.interval_seconds == 30
    heartbeat.limit(90)
    assert heartbeat.interval_seconds == 30
    heartbeat.limit(9)
    assert heartbeat.interval_seconds == 3
    heartbeat.stop()
    heartbeat.start()
    heartbeat.stop()


def test_a_heartbeat_goes_on_after_failures(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    beats: list[float] = []

    def beat() -> None:
        beats.append(time.monotonic())
        if len(beats) in (2, 3):
            raise WireError("nobody there")

    heartbeat = Heartbeat(0.01, beat)
    heartbeat.start()
    heartbeat.start()
    wait_for(lambda: len(beats) > 5)
    heartbeat.stop()
    assert caplog.text.count("did not get through") == 1
    assert caplog.text.count("gets through again") == 1

"""Probes do what clients do: over HTTP, gRPC's health and GetHealth alike."""

from __future__ import annotations

import threading
import time

import grpc
import pytest
from grpc_health.v1 import health_pb2 as standard_pb2
from grpc_health.v1 import health_pb2_grpc as standard_pb2_grpc

import mxserver.readiness
from mxserver.calls.pools import POOLS
from mxserver.periodic import Periodic
from mxserver.server import Server
from mxserver.store import SqliteStore
from mxserver.wire.calls import ServerClient
from mxserver.wire.proto import p2p_pb2

READY = p2p_pb2.SOURCE_STATUS_READY
STALE = p2p_pb2.SOURCE_STATUS_STALE
SERVING = standard_pb2.HealthCheckResponse.SERVING
NOT_SERVING = standard_pb2.HealthCheckResponse.NOT_SERVING


def states(server: Server, client: ServerClient) -> tuple[str | None, int]:
    """Why it is not ready, over HTTP; and the state of gRPC's health."""
    with grpc.insecure_channel(client.address) as channel:
        health = standard_pb2_grpc.HealthStub(channel)
        return server._operations.not_ready(), health.Check(standard_pb2.HealthCheckRequest()).status


def test_heartbeats_that_are_not_answered_turn_readiness_red(
    server: Server, client: ServerClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All threads of heartbeats hang; calls are answered, so that a restart is not asked for."""
    monkeypatch.setattr(mxserver.readiness, "ANSWER_SECONDS", 0.5)
    assert states(server, client) == (None, SERVING)
    go_on = threading.Event()
    pool = server._pools._pools["heartbeats"]
    held = [pool.submit(go_on.wait, 120) for _ in range(POOLS["heartbeats"].threads)]
    try:
        while states(server, client)[1] == SERVING:  # until the next look: the test's time-out
            time.sleep(0.01)
        assert states(server, client)[0] == "a heartbeat is not answered within 0.5 s"
        assert server._operations.readiness.not_alive() is None
    finally:
        go_on.set()
    for one in held:
        one.result()
    while states(server, client) != (None, SERVING):
        time.sleep(0.01)


def test_calls_that_are_never_answered_ask_for_a_restart(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    readiness = server._operations.readiness
    server._looker.stop()
    monkeypatch.setattr(mxserver.readiness, "ANSWER_SECONDS", 0.05)
    server._grpc.stop(0).wait()
    for _ in range(mxserver.readiness.MOST_FAILURES):
        assert readiness.not_alive() is None
        readiness.look()
    assert readiness.not_alive() == "no call is answered any more"


def test_a_store_that_ended_asks_for_a_restart(
    server: Server, client: ServerClient, sqlite_store: SqliteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite_store._index, "apply", None)
    with pytest.raises(Exception, match="writing failed"):
        client.publish(p2p_pb2.SourceIdentity(model_name="m"), p2p_pb2.WorkerMetadata(), "w")
    while not server.must_end:
        time.sleep(0.01)
    assert "has ended" in (server._operations.not_ready() or "")
    assert "has ended" in (server._operations.readiness.not_alive() or "")
    assert client.health().status != "ok"


def test_goodbyes_on_a_slow_disk_hold_no_heartbeats(
    server: Server, client: ServerClient, sqlite_store: SqliteStore
) -> None:
    """More status changes than heartbeats have threads wait for the disk; other workers' heartbeats go on."""
    identity, count = p2p_pb2.SourceIdentity(model_name="m"), POOLS["heartbeats"].threads + 8
    for number in range(count + 1):
        worker = p2p_pb2.WorkerMetadata(status=READY)
        source = client.publish(identity, worker, f"w{number}").mx_source_id
    held, go_on = threading.Event(), threading.Event()

    def hold(_: object) -> None:
        held.set()
        assert go_on.wait(120)

    def leave(number: int) -> None:
        client.update_status(source, f"w{number}", 0, STALE)

    threads = [threading.Thread(target=sqlite_store._change, args=(hold,))]
    threads[0].start()
    assert held.wait(120)
    threads += [threading.Thread(target=leave, args=(number,)) for number in range(count)]
    for thread in threads[1:]:
        thread.start()
    try:
        while sqlite_store._changes.qsize() < count:
            threads[0].join(0.01)
        client.update_status(source, f"w{count}", 0, READY)
    finally:
        go_on.set()
        for thread in threads:
            thread.join()
    assert [one.worker_id for one in client.list_sources(status=READY)] == [f"w{count}"]


def test_a_periodic_thread_outlives_an_error_and_tells_of_it() -> None:
    calls, went_on = [], threading.Event()

    def step() -> None:
        calls.append(len(calls))
        if len(calls) == 1:
            raise RuntimeError("once")
        told.append(periodic.problem)
        if len(calls) > 2:
            went_on.set()

    told: list[str | None] = []
    periodic = Periodic("steps", 0.001, step)
    assert periodic.problem is None
    periodic.start()
    assert went_on.wait(60)
    periodic.stop()
    periodic.stop()
    assert told[:2] == ["the thread steps fails: RuntimeError('once')", None]
    assert periodic.problem is None

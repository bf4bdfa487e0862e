"""Publish and heartbeat, by one client over a real socket to a server process on each store."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.micro.conftest import Measure
from mxbench.control.processes import Redis, Server
from mxserver.wire.calls import ServerClient
from mxserver.wire.proto import p2p_pb2

IDENTITY = p2p_pb2.SourceIdentity(mx_version="mx-2", model_name="bench/micro", dtype="bfloat16")
READY = p2p_pb2.SOURCE_STATUS_READY

pytestmark = pytest.mark.benchmark(group="calls to a server")


@pytest.fixture(scope="module", params=["memory", "sqlite", "redis"])
def client(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerClient]:
    folder: Path = tmp_path_factory.mktemp("server")
    core = min(os.sched_getaffinity(0))
    arguments = ["--store", request.param, "--store-path", str(folder / "state.sqlite3")]
    redis = Redis(folder, core) if request.param == "redis" else None
    if redis is not None:
        arguments += ["--redis-url", redis.url]
    server = Server(folder, 0, arguments, core)
    with ServerClient(server.address) as opened:
        yield opened
    server.stop()
    if redis is not None:
        redis.stop()


def test_publish(measure: Measure, client: ServerClient) -> None:
    worker = p2p_pb2.WorkerMetadata(worker_rank=0, status=READY, nixl_metadata=bytes(2048))
    epoch = 0

    def publish() -> None:
        nonlocal epoch
        epoch = client.publish(IDENTITY, worker, "publisher", epoch).epoch

    measure(publish, times=1)


def test_heartbeat(measure: Measure, client: ServerClient) -> None:
    worker = p2p_pb2.WorkerMetadata(worker_rank=0, status=READY)
    record = client.publish(IDENTITY, worker, "beating")
    measure(
        lambda: client.update_status(record.mx_source_id, "beating", 0, READY, epoch=record.epoch, source_load=0.5),
        times=1,
    )


def test_limit_empty_call(measure: Measure, client: ServerClient) -> None:
    """A call that touches no store: gRPC, the way through the server and back."""
    measure(client.health, times=1)

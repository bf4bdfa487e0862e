"""The server's services over a real socket, as wire.md has them."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2 as standard_pb2
from grpc_health.v1 import health_pb2_grpc as standard_pb2_grpc

import mxserver
import mxserver.server
from mxserver.server import PortUnavailable, Server
from mxserver.settings import load_settings
from mxserver.store import Leases, MemoryStore, SqliteStore, SystemClock
from mxserver.wire import ServerRefused, ServerUnreachable, StaleEpoch
from mxserver.wire.calls import ServerClient, channel_options, source_id
from mxserver.wire.proto import api_pb2, api_pb2_grpc, p2p_pb2, p2p_pb2_grpc
from tests.server.stores import INITIALIZING, READY, STALE

IDENTITY = p2p_pb2.SourceIdentity(mx_version="mx-1", model_name="Org/Model", tensor_parallel_size=1, dtype="bfloat16")
SOURCE = source_id(IDENTITY)
WORKER = p2p_pb2.WorkerMetadata(
    worker_rank=3,
    nixl_metadata=b"agent",
    tensors=[p2p_pb2.TensorDescriptor(name="w", addr=2**63, size=8, device_id=1, dtype="torch.bfloat16")],
    metadata_endpoint="10.0.0.1:5555",
    agent_name="a",
    worker_grpc_endpoint="10.0.0.1:6555",
    accelerator="cuda",
    topology={"zone": "a"},
    tensor_source=p2p_pb2.TensorSourceMetadata(),
)


@pytest.fixture
def channel(server: Server) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(f"127.0.0.1:{server.port}", options=channel_options()) as opened:
        yield opened


@pytest.fixture
def p2p(channel: grpc.Channel) -> p2p_pb2_grpc.P2pServiceStub:
    return p2p_pb2_grpc.P2pServiceStub(channel)


# What our client sees


def test_publish_answers_with_id_epoch_and_lease(client: ServerClient) -> None:
    first = client.publish(IDENTITY, WORKER, "w")
    assert (first.success, first.mx_source_id, first.worker_id, first.lease_ms) == (True, SOURCE, "w", 90_000)
    second = client.publish(IDENTITY, WORKER, "w", epoch=first.epoch)
    assert second.epoch > first.epoch > 0


def test_the_log_has_who_came_and_who_left(client: ServerClient, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "mxserver.services.p2p")
    epoch = client.publish(IDENTITY, WORKER, "w").epoch
    for status in (READY, READY, STALE, STALE):
        client.update_status(SOURCE, "w", 3, status, epoch=epoch)
    lines = [record.getMessage() for record in caplog.records if record.name == "mxserver.services.p2p"]
    came = f"published source={SOURCE} worker=w rank=3 status=INITIALIZING epoch={epoch} model='Org/Model'"
    assert lines == [came, f"left source={SOURCE} worker=w rank=3"]


def test_published_metadata_comes_back_whole(client: ServerClient) -> None:
    epoch = client.publish(IDENTITY, WORKER, "w").epoch
    client.update_status(SOURCE, "w", 3, READY, epoch=epoch, source_load=0.5)
    response = client.get_metadata(SOURCE, "w")
    assert response is not None
    assert (response.identity, response.epoch, response.worker.status) == (IDENTITY, epoch, READY)
    [reference] = client.list_sources(IDENTITY, status=READY)
    assert reference == p2p_pb2.SourceInstanceRef(
        mx_source_id=SOURCE,
        worker_id="w",
        model_name="Org/Model",
        worker_rank=3,
        accelerator="cuda",
        updated_at=response.worker.updated_at,
        topology={"zone": "a"},
        source_load=0.5,
        worker_grpc_endpoint=WORKER.worker_grpc_endpoint,
    )
    response.worker.ClearField("status")
    response.worker.ClearField("updated_at")
    assert response.worker == WORKER


def test_fields_that_this_version_does_not_know_are_kept(p2p: p2p_pb2_grpc.P2pServiceStub) -> None:
    unknown_field = b"\xfa\x3e\x03new"  # number 1007, length-delimited
    worker = p2p_pb2.WorkerMetadata.FromString(WORKER.SerializeToString() + unknown_field)
    p2p.PublishMetadata(p2p_pb2.PublishMetadataRequest(identity=IDENTITY, worker=worker, worker_id="w"))
    found = p2p.GetMetadata(p2p_pb2.GetMetadataRequest(mx_source_id=SOURCE, worker_id="w"))
    assert unknown_field in found.worker.SerializeToString()


def test_older_epochs_are_stale_for_our_client(client: ServerClient) -> None:
    old = client.publish(IDENTITY, WORKER, "w").epoch
    client.publish(IDENTITY, WORKER, "w")
    with pytest.raises(StaleEpoch, match="newer life"):
        client.publish(IDENTITY, WORKER, "w", epoch=old)
    with pytest.raises(StaleEpoch, match="newer life"):
        client.update_status(SOURCE, "w", 3, READY, epoch=old)


def test_refusals_are_errors_of_our_client(client: ServerClient) -> None:
    with pytest.raises(ServerRefused, match=r"identity\.model_name is missing"):
        client.publish(p2p_pb2.SourceIdentity(), WORKER, "w")
    with pytest.raises(ServerRefused, match="publish it first"):
        client.update_status(SOURCE, "w", 3, READY)
    assert client.get_metadata(SOURCE, "w") is None


def test_filters_of_our_client(client: ServerClient) -> None:
    for n in range(3):
        client.publish(IDENTITY, p2p_pb2.WorkerMetadata(worker_rank=n), f"w{n}")
    client.update_status(SOURCE, "w1", 1, READY)
    other = p2p_pb2.SourceIdentity(model_name="Other")
    client.publish(other, WORKER, "w3")

    def listed(*arguments: p2p_pb2.SourceIdentity, **filters: object) -> list[str]:
        return [reference.worker_id for reference in client.list_sources(*arguments, **filters)]

    assert sorted(listed()) == ["w0", "w1", "w2", "w3"]
    assert listed(other) == ["w3"]
    assert sorted(listed(IDENTITY)) == ["w0", "w1", "w2"]
    assert sorted(listed(p2p_pb2.SourceIdentity(dtype="only"))) == ["w0", "w1", "w2", "w3"]
    assert listed(status=READY) == ["w1"]
    assert listed(status=STALE) == []
    assert sorted(listed(model_name="ORG/model")) == ["w0", "w1", "w2"]
    assert listed(worker_rank=2) == ["w2"]
    assert listed(worker_rank=0, status=READY) == []
    assert len(listed(limit=2)) == 2


def test_health_of_our_client(client: ServerClient) -> None:
    health = client.health()
    assert (health.version, health.status) == (mxserver.__version__, "ok")


# What existing clients rely on


@pytest.mark.parametrize(
    ("request_", "missing"),
    [
        (p2p_pb2.PublishMetadataRequest(worker=WORKER, worker_id="w"), "identity is"),
        (
            p2p_pb2.PublishMetadataRequest(identity=p2p_pb2.SourceIdentity(dtype="x"), worker=WORKER, worker_id="w"),
            "identity.model_name is",
        ),
        (p2p_pb2.PublishMetadataRequest(identity=IDENTITY, worker=WORKER), "worker_id is"),
        (p2p_pb2.PublishMetadataRequest(identity=IDENTITY, worker_id="w"), "worker is"),
    ],
)
def test_publishing_too_little_is_a_soft_error(
    p2p: p2p_pb2_grpc.P2pServiceStub, request_: p2p_pb2.PublishMetadataRequest, missing: str
) -> None:
    response = p2p.PublishMetadata(request_)
    assert not response.success
    assert response.message.startswith(missing)
    assert not p2p.ListSources(p2p_pb2.ListSourcesRequest()).instances


@pytest.mark.parametrize(
    "request_",
    [
        p2p_pb2.UpdateStatusRequest(),
        p2p_pb2.UpdateStatusRequest(mx_source_id=SOURCE, worker_id="w", worker_rank=9, status=READY),
        p2p_pb2.UpdateStatusRequest(mx_source_id=SOURCE, worker_id="v", worker_rank=3, status=READY),
        p2p_pb2.UpdateStatusRequest(mx_source_id="f" * 16, worker_id="w", worker_rank=3, status=READY),
        p2p_pb2.UpdateStatusRequest(mx_source_id=SOURCE, worker_id="w", worker_rank=3),
        p2p_pb2.UpdateStatusRequest(mx_source_id=SOURCE, worker_id="w", worker_rank=3, status=99),
    ],
)
def test_updates_that_make_no_sense_are_soft_errors(
    p2p: p2p_pb2_grpc.P2pServiceStub, request_: p2p_pb2.UpdateStatusRequest
) -> None:
    p2p.PublishMetadata(p2p_pb2.PublishMetadataRequest(identity=IDENTITY, worker=WORKER, worker_id="w"))
    response = p2p.UpdateStatus(request_)
    assert not response.success
    assert response.message


@pytest.mark.parametrize("ids", [("", ""), (SOURCE, ""), ("", "w"), (SOURCE, "v"), ("f" * 16, "w")])
def test_unknown_ids_are_not_found(p2p: p2p_pb2_grpc.P2pServiceStub, ids: tuple[str, str]) -> None:
    p2p.PublishMetadata(p2p_pb2.PublishMetadataRequest(identity=IDENTITY, worker=WORKER, worker_id="w"))
    response = p2p.GetMetadata(p2p_pb2.GetMetadataRequest(mx_source_id=ids[0], worker_id=ids[1]))
    assert (response.found, response.HasField("worker")) == (False, False)


def test_life_of_an_existing_client_without_epochs(p2p: p2p_pb2_grpc.P2pServiceStub) -> None:
    publish = p2p_pb2.PublishMetadataRequest(identity=IDENTITY, worker=WORKER, worker_id="w")
    update = p2p_pb2.UpdateStatusRequest(mx_source_id=SOURCE, worker_id="w", worker_rank=3, status=READY)
    get = p2p_pb2.GetMetadataRequest(mx_source_id=SOURCE, worker_id="w")
    assert p2p.PublishMetadata(publish).success
    assert p2p.GetMetadata(get).worker.status == INITIALIZING
    assert p2p.UpdateStatus(update).success
    assert p2p.PublishMetadata(publish).success
    assert p2p.GetMetadata(get).worker.status == READY
    assert p2p.UpdateStatus(update).success
    assert len(p2p.ListSources(p2p_pb2.ListSourcesRequest(status_filter=READY)).instances) == 1


def test_what_a_client_says_of_updated_at_is_not_taken(p2p: p2p_pb2_grpc.P2pServiceStub) -> None:
    worker = p2p_pb2.WorkerMetadata(updated_at=5)
    p2p.PublishMetadata(p2p_pb2.PublishMetadataRequest(identity=IDENTITY, worker=worker, worker_id="w"))
    [reference] = p2p.ListSources(p2p_pb2.ListSourcesRequest(min_updated_at=6)).instances
    assert reference.updated_at > 1_600_000_000_000


def test_filters_that_say_nothing_are_none(p2p: p2p_pb2_grpc.P2pServiceStub) -> None:
    p2p.PublishMetadata(p2p_pb2.PublishMetadataRequest(identity=IDENTITY, worker=WORKER, worker_id="w"))
    request = p2p_pb2.ListSourcesRequest(
        status_filter=p2p_pb2.SOURCE_STATUS_UNKNOWN, model_name_filter="", limit=0, min_training_step=0
    )
    [reference] = p2p.ListSources(request).instances
    assert not reference.HasField("training_step")
    assert not reference.HasField("layout_signature")
    assert not reference.HasField("source_load")


def test_question_for_a_training_step_is_refused_and_a_status_that_is_none_is_no_filter(
    p2p: p2p_pb2_grpc.P2pServiceStub,
) -> None:
    p2p.PublishMetadata(p2p_pb2.PublishMetadataRequest(identity=IDENTITY, worker=WORKER, worker_id="w"))
    with pytest.raises(grpc.RpcError) as refused:
        p2p.ListSources(p2p_pb2.ListSourcesRequest(min_training_step=1))
    assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED
    unknown = p2p_pb2.ListSourcesRequest(status_filter=77)  # type: ignore[arg-type]
    assert len(p2p.ListSources(unknown).instances) == 1


@pytest.mark.parametrize("load", [float("nan"), float("inf"), float("-inf")])
def test_load_that_is_no_number_is_left_out(p2p: p2p_pb2_grpc.P2pServiceStub, load: float) -> None:
    p2p.PublishMetadata(p2p_pb2.PublishMetadataRequest(identity=IDENTITY, worker=WORKER, worker_id="w"))
    update = p2p_pb2.UpdateStatusRequest(
        mx_source_id=SOURCE, worker_id="w", worker_rank=3, status=READY, source_load=load
    )
    assert p2p.UpdateStatus(update).success
    [reference] = p2p.ListSources(p2p_pb2.ListSourcesRequest()).instances
    assert not reference.HasField("source_load")


def test_messages_of_100_mib_pass(tmp_path: Path) -> None:
    metadata = os.urandom(1024) * (99 * 1024)
    flags = {"host": "127.0.0.1", "port": "0", "store": "sqlite", "store_path": str(tmp_path / "state.sqlite3")}
    with contextlib.closing(Server(load_settings(flags))) as server, ServerClient(f"127.0.0.1:{server.port}") as client:
        client.publish(IDENTITY, p2p_pb2.WorkerMetadata(nixl_metadata=metadata), "big")
        response = client.get_metadata(SOURCE, "big")
        assert response is not None
        assert response.worker.nixl_metadata == metadata


def test_ping(channel: grpc.Channel) -> None:
    api = api_pb2_grpc.ApiServiceStub(channel)
    assert api.SendRequest(api_pb2.ApiRequest(id="1", action="ping")) == api_pb2.ApiResponse(
        success=True, data=b'{"message":"pong"}'
    )
    other = api.SendRequest(api_pb2.ApiRequest(id="1", action="reboot"))
    assert not other.success
    assert "'reboot'" in other.error


def test_service_that_this_version_does_not_have_is_unimplemented(channel: grpc.Channel) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        channel.unary_unary("/model_express.later.LaterService/Call")(b"")
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


# A store that is down, and the standard health service


SERVICES = (
    "",
    "model_express.p2p.P2pService",
    "model_express.health.HealthService",
    "model_express.api.ApiService",
    "grpc.health.v1.Health",
)
SERVING = standard_pb2.HealthCheckResponse.SERVING
NOT_SERVING = standard_pb2.HealthCheckResponse.NOT_SERVING


def test_standard_health_knows_each_service(channel: grpc.Channel) -> None:
    health = standard_pb2_grpc.HealthStub(channel)
    for service in SERVICES:
        assert health.Check(standard_pb2.HealthCheckRequest(service=service)).status == SERVING
    with pytest.raises(grpc.RpcError) as caught:
        health.Check(standard_pb2.HealthCheckRequest(service="model_express.later.LaterService"))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def test_store_that_is_down_is_unavailable_and_seen_in_health(
    client: ServerClient, channel: grpc.Channel, tmp_path: Path
) -> None:
    client.publish(IDENTITY, WORKER, "w")
    health = standard_pb2_grpc.HealthStub(channel)
    watch = health.Watch(standard_pb2.HealthCheckRequest(service="model_express.p2p.P2pService"), timeout=120)
    assert next(watch).status == SERVING
    (tmp_path / "state.sqlite3").unlink()
    assert next(watch).status == NOT_SERVING
    assert health.Check(standard_pb2.HealthCheckRequest()).status == NOT_SERVING
    assert health.Check(standard_pb2.HealthCheckRequest(service="model_express.api.ApiService")).status == SERVING
    with pytest.raises(ServerUnreachable, match=r"UNAVAILABLE: .*is gone.*MX_STORE_UNAVAILABLE"):
        client.publish(IDENTITY, WORKER, "other")
    with pytest.raises(ServerUnreachable, match="UNAVAILABLE"):
        client.update_status(SOURCE, "w", 3, READY)
    assert "is gone" in client.health().status
    assert [reference.worker_id for reference in client.list_sources()] == ["w"]


def test_drain_tells_watchers_and_ends_them(server: Server, channel: grpc.Channel) -> None:
    health = standard_pb2_grpc.HealthStub(channel)
    watches = [health.Watch(standard_pb2.HealthCheckRequest(service=service), timeout=120) for service in SERVICES]
    assert [next(watch).status for watch in watches] == [SERVING] * len(SERVICES)
    stopped = server.drain()
    assert [[response.status for response in watch] for watch in watches] == [[NOT_SERVING]] * len(SERVICES)
    assert stopped.wait(100)  # the drain time-out of this server is 120 s: nobody waited for it


def test_calls_that_run_when_the_drain_begins_are_answered(
    server: Server, client: ServerClient, sqlite_store: SqliteStore
) -> None:
    """The writer is held up, so that calls wait for their commit while the server drains."""
    held, go_on = threading.Event(), threading.Event()

    def hold(_: object) -> None:
        held.set()
        assert go_on.wait(120)

    holder = threading.Thread(target=sqlite_store._change, args=(hold,))
    holder.start()
    assert held.wait(120)
    epochs: list[int] = []
    calls = [
        threading.Thread(target=lambda n=n: epochs.append(client.publish(IDENTITY, WORKER, f"w{n}").epoch))
        for n in range(20)
    ]
    for call in calls:
        call.start()
    while sqlite_store._changes.qsize() < len(calls):
        holder.join(0.01)
    stopped = server.drain()
    with ServerClient(client.address) as late, pytest.raises(ServerUnreachable, match="UNAVAILABLE"):
        late.publish(IDENTITY, WORKER, "late")
    go_on.set()
    for call in (*calls, holder):
        call.join()
    assert stopped.wait(120)
    assert len(set(epochs)) == len(calls)


@pytest.mark.parametrize("drains", [True, False])
def test_no_lease_runs_out_while_the_server_refuses_heartbeats(monkeypatch: pytest.MonkeyPatch, drains: bool) -> None:
    """A server that drains: whoever is alive cannot say so any more, and goes on elsewhere."""

    class Later(SystemClock):
        seconds = 0.0

        def monotonic_seconds(self) -> float:
            return self.seconds

    clock = Later()
    monkeypatch.setattr(mxserver.server, "open_store", lambda _settings, _clock=None: MemoryStore(Leases(), clock))
    running = Server(load_settings({"host": "127.0.0.1", "port": "0", "store": "memory"}))
    running._ticker.stop()
    try:
        with ServerClient(f"127.0.0.1:{running.port}") as client:
            epoch = client.publish(IDENTITY, WORKER, "w").epoch
            client.update_status(SOURCE, "w", 3, READY, epoch=epoch)
        if drains:
            running.drain()
        clock.seconds += 2 * Leases().heartbeat_seconds
        running._tick()
        expired, _ = running._store.sweep()
        assert expired == drains, "it was swept before, if the server heard workers"
    finally:
        running.close()


def test_a_port_that_was_taken_meanwhile_is_refused_with_the_way_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Between the look before the store is opened and listening."""
    monkeypatch.setattr(mxserver.server, "require_free_port", lambda host, port: None)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port, store = str(taken.getsockname()[1]), str(tmp_path / "state.sqlite3")
        with pytest.raises(PortUnavailable, match="choose with --host and --port"):
            Server(load_settings({"host": "127.0.0.1", "port": port, "store_path": store}))


@pytest.mark.parametrize(
    ("identity", "worker", "worker_id", "named"),
    [
        ({"model_name": "m" * 513}, {}, "w", "identity.model_name"),
        ({}, {}, "w" * 257, "worker_id"),
        ({"extra_parameters": {"k": "v" * 70_000}}, {}, "w", "identity has"),
        ({}, {"accelerator": "a" * 257}, "w", "worker.accelerator"),
        ({}, {"topology": {"zone": "z" * 20_000}}, "w", "worker.topology"),
        ({}, {"worker_grpc_endpoint": "h" * 20_000}, "w", "worker.worker_grpc_endpoint"),
    ],
)
def test_what_is_in_every_listing_is_bounded(
    p2p: p2p_pb2_grpc.P2pServiceStub,
    identity: dict[str, object],
    worker: dict[str, object],
    worker_id: str,
    named: str,
) -> None:
    request = p2p_pb2.PublishMetadataRequest(
        identity=p2p_pb2.SourceIdentity(**({"model_name": "Org/Model"} | identity)),  # type: ignore[arg-type]
        worker=p2p_pb2.WorkerMetadata(**worker),  # type: ignore[arg-type]
        worker_id=worker_id,
    )
    response = p2p.PublishMetadata(request, timeout=30)
    assert not response.success
    assert named in response.message
    assert "MX_SERVER_LIMITS" in response.message
    assert not p2p.ListSources(p2p_pb2.ListSourcesRequest(), timeout=30).instances

"""The client against servers that are away, slow, old, or answer with errors; each over a real socket."""

from __future__ import annotations

import http.server
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest

from mxserver.wire import ServerRefused, ServerUnreachable, StaleEpoch
from mxserver.wire.calls import ERROR_CODE_METADATA, ServerClient, channel_options
from mxserver.wire.calls.channels import MAX_MESSAGE_BYTES
from mxserver.wire.files import ModelClient
from mxserver.wire.proto import p2p_pb2, p2p_pb2_grpc

IDENTITY = p2p_pb2.SourceIdentity(model_name="m")
WORKER = p2p_pb2.WorkerMetadata()
Answer = Callable[[Any, grpc.ServicerContext], Any]


class Scripted(p2p_pb2_grpc.P2pServiceServicer):
    """A server of the protocol that answers as the test says."""

    def __init__(self, answer: Answer) -> None:
        self.PublishMetadata = answer
        self.ListSources = answer
        self.GetMetadata = answer
        self.UpdateStatus = answer


@pytest.fixture
def serve() -> Iterator[Callable[[Answer], str]]:
    servers: list[grpc.Server] = []

    def start(answer: Answer) -> str:
        server = grpc.server(ThreadPoolExecutor(2), options=channel_options())
        p2p_pb2_grpc.add_P2pServiceServicer_to_server(Scripted(answer), server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        servers.append(server)
        return f"127.0.0.1:{port}"

    yield start
    for server in servers:
        server.stop(0).wait()


class _Page(http.server.BaseHTTPRequestHandler):
    """The status page's port, or anything else that speaks HTTP/1.1."""

    def log_message(self, *words: object) -> None:
        """In silence."""


@pytest.mark.parametrize("client", [ServerClient, ModelClient])
def test_another_service_answers(client: Callable[[str], Any]) -> None:
    with http.server.HTTPServer(("127.0.0.1", 0), _Page) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            with client(f"127.0.0.1:{server.server_port}") as called, pytest.raises(ServerUnreachable) as caught:
                _ = called.health() if isinstance(called, ServerClient) else called.cached_models()
        finally:
            server.shutdown()
            thread.join()
    assert "no ModelExpress server answers there: its port is 8001 unless set" in str(caught.value)


def test_nobody_listens() -> None:
    with socket.socket() as taken:  # bound and not listening: nobody else gets the port
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with ServerClient(address) as client, pytest.raises(ServerUnreachable, match="UNAVAILABLE") as caught:
            client.list_sources()
        assert address in str(caught.value)
        assert "ListSources" in str(caught.value)


def test_name_that_does_not_resolve() -> None:
    with ServerClient("no-such-host.invalid:1") as client, pytest.raises(ServerUnreachable, match="no-such-host"):
        client.health()


def test_no_answer_within_the_deadline(serve: Callable[[Answer], str]) -> None:
    release = threading.Event()

    def wait(request: object, context: grpc.ServicerContext) -> p2p_pb2.ListSourcesResponse:
        release.wait(120)
        return p2p_pb2.ListSourcesResponse()

    with ServerClient(serve(wait), timeout_seconds=0.2) as client:
        with pytest.raises(ServerUnreachable, match=r"no answer within 0\.2 s"):
            client.list_sources()
        release.set()


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (grpc.StatusCode.UNAVAILABLE, ServerUnreachable),
        (grpc.StatusCode.CANCELLED, ServerUnreachable),
        (grpc.StatusCode.FAILED_PRECONDITION, ServerRefused),
        (grpc.StatusCode.PERMISSION_DENIED, ServerRefused),
        (grpc.StatusCode.INTERNAL, ServerRefused),
    ],
)
def test_statuses_become_errors_with_their_reason(
    serve: Callable[[Answer], str], status: grpc.StatusCode, error: type[Exception]
) -> None:
    def refuse(request: object, context: grpc.ServicerContext) -> None:
        context.abort(status, "the reason")

    with ServerClient(serve(refuse)) as client:
        for call in (
            lambda: client.publish(IDENTITY, WORKER, "w"),
            lambda: client.list_sources(),
            lambda: client.get_metadata("s", "w"),
            lambda: client.update_status("s", "w", 0, p2p_pb2.SOURCE_STATUS_READY),
        ):
            with pytest.raises(error, match=f"{status.name}: the reason") as caught:
                call()
            assert type(caught.value) is error


def test_stale_epoch_is_told_by_the_code_in_the_metadata(serve: Callable[[Answer], str]) -> None:
    def refuse(request: object, context: grpc.ServicerContext) -> None:
        context.set_trailing_metadata(((ERROR_CODE_METADATA, StaleEpoch.code),))
        context.abort(grpc.StatusCode.FAILED_PRECONDITION, "newer life")

    with ServerClient(serve(refuse)) as client, pytest.raises(StaleEpoch, match="newer life"):
        client.publish(IDENTITY, WORKER, "w", epoch=1)


def test_soft_refusals_carry_the_servers_message(serve: Callable[[Answer], str]) -> None:
    def refuse(request: object, context: grpc.ServicerContext) -> object:
        if isinstance(request, p2p_pb2.PublishMetadataRequest):
            return p2p_pb2.PublishMetadataResponse(success=False, message="no room")
        return p2p_pb2.UpdateStatusResponse(success=False, message="who are you")

    with ServerClient(serve(refuse)) as client:
        with pytest.raises(ServerRefused, match="no room"):
            client.publish(IDENTITY, WORKER, "w")
        with pytest.raises(ServerRefused, match="who are you"):
            client.update_status("s", "w", 0, p2p_pb2.SOURCE_STATUS_READY)


def test_requests_carry_only_the_filters_that_are_given(serve: Callable[[Answer], str]) -> None:
    seen: list[p2p_pb2.ListSourcesRequest] = []

    def note(request: p2p_pb2.ListSourcesRequest, context: grpc.ServicerContext) -> p2p_pb2.ListSourcesResponse:
        seen.append(request)
        return p2p_pb2.ListSourcesResponse()

    with ServerClient(serve(note)) as client:
        client.list_sources()
        client.list_sources(IDENTITY, status=p2p_pb2.SOURCE_STATUS_READY, model_name="m", worker_rank=0, limit=5)
    assert seen[0] == p2p_pb2.ListSourcesRequest()
    assert not seen[0].HasField("worker_rank_filter")
    assert seen[1].HasField("worker_rank_filter")
    assert (seen[1].identity, seen[1].status_filter, seen[1].limit) == (IDENTITY, p2p_pb2.SOURCE_STATUS_READY, 5)


def test_server_of_the_original_protocol_gives_epoch_0(serve: Callable[[Answer], str]) -> None:
    """It answers without our fields, and never sees them when they are 0."""
    seen: list[bytes] = []

    def publish(request: Any, context: grpc.ServicerContext) -> p2p_pb2.PublishMetadataResponse:
        seen.append(request.SerializeToString())
        return p2p_pb2.PublishMetadataResponse(success=True, mx_source_id="s", worker_id="w")

    with ServerClient(serve(publish)) as client:
        response = client.publish(IDENTITY, WORKER, "w")
    assert (response.epoch, response.lease_ms) == (0, 0)
    expected = p2p_pb2.PublishMetadataRequest(identity=IDENTITY, worker=WORKER, worker_id="w")
    assert seen == [expected.SerializeToString()]


def test_closed_client_is_unreachable() -> None:
    client = ServerClient("127.0.0.1:1")
    client.close()
    client.close()
    with pytest.raises(ServerUnreachable, match="closed"):
        client.health()


def test_options_allow_messages_of_100_mib_both_ways() -> None:
    options = dict(channel_options())
    assert options["grpc.max_send_message_length"] == options["grpc.max_receive_message_length"] == MAX_MESSAGE_BYTES
    assert MAX_MESSAGE_BYTES == 104_857_600


def test_two_servers_do_not_share_a_port() -> None:
    servers = [grpc.server(ThreadPoolExecutor(1), options=channel_options()) for _ in range(2)]
    port = servers[0].add_insecure_port("127.0.0.1:0")
    with pytest.raises(RuntimeError):
        servers[1].add_insecure_port(f"127.0.0.1:{port}")
    for server in servers:
        server.stop(None)


def test_many_threads_share_a_client(serve: Callable[[Answer], str]) -> None:
    def answer(request: object, context: grpc.ServicerContext) -> p2p_pb2.ListSourcesResponse:
        return p2p_pb2.ListSourcesResponse(instances=[p2p_pb2.SourceInstanceRef(worker_id="w")])

    with ServerClient(serve(answer)) as client, ThreadPoolExecutor(8) as threads:
        lists = list(threads.map(lambda _: client.list_sources(), range(200)))
    assert [reference.worker_id for [reference] in lists] == ["w"] * 200

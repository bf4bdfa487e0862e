"""Limits on what clients may take, and the line about what stands open."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from mxserver.calls import refusals
from mxserver.limits import DEFAULT
from mxserver.security import setup
from mxserver.security.interceptors import StreamLimit
from mxserver.settings import load_settings
from mxserver.wire import ServerRefused
from mxserver.wire.calls import ServerClient, channel_options
from mxserver.wire.calls.channels import MAX_MESSAGE_BYTES
from mxserver.wire.credentials import ClientCredentials
from mxserver.wire.proto import p2p_pb2
from tests.security.conftest import IDENTITY, StartServer, access_file
from tests.server.command.test_cli import half_of_a_call

PLAIN = ClientCredentials()


def test_message_limit_is_what_the_setting_says(start_server: StartServer) -> None:
    server = start_server(limits="publish_bytes=64KiB")
    with ServerClient(f"127.0.0.1:{server.port}", credentials=PLAIN) as client:
        client.publish(IDENTITY, p2p_pb2.WorkerMetadata(nixl_metadata=b"x" * 60_000), "w")
        with pytest.raises(ServerRefused, match="RESOURCE_EXHAUSTED"):
            client.publish(IDENTITY, p2p_pb2.WorkerMetadata(nixl_metadata=b"x" * 70_000), "w")


def test_default_message_limit_is_the_protocols() -> None:
    options = dict(setup.server_options(load_settings({})))
    assert options["grpc.max_receive_message_length"] == DEFAULT.publish_bytes
    assert options["grpc.max_send_message_length"] == MAX_MESSAGE_BYTES
    assert options["grpc.keepalive_time_ms"] == 30_000
    options = dict(setup.server_options(load_settings({"limits": "calls=7,silence_seconds=5"})))
    assert (options["grpc.keepalive_time_ms"], options["grpc.max_concurrent_streams"]) == (5000, 7)
    assert dict(setup.server_options(load_settings({})))["grpc.max_concurrent_streams"] == setup.MOST_CALLS_A_CONNECTION


ENSURE = "/model_express.model.ModelService/EnsureModelDownloaded"


class Gate(grpc.GenericRpcHandler):
    """A stream that ends, and a call that answers, when the gate opens."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.begun = threading.Semaphore(0)

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        def stream(request: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
            yield b"1"
            self.open.wait(120)

        def call(request: bytes, context: grpc.ServicerContext) -> bytes:
            return b""

        if details.method in ("/s/stream", ENSURE):
            return grpc.unary_stream_rpc_method_handler(stream)
        return grpc.unary_unary_rpc_method_handler(call)


@pytest.fixture
def gate() -> Iterator[tuple[Gate, str]]:
    handler = Gate()
    server = grpc.server(ThreadPoolExecutor(8), interceptors=[StreamLimit(2)])
    server.add_generic_rpc_handlers((handler,))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield handler, f"127.0.0.1:{port}"
    handler.open.set()
    server.stop(None).wait()


def test_client_with_too_many_streams_is_refused_more_until_one_ends(gate: tuple[Gate, str]) -> None:
    handler, address = gate
    with grpc.insecure_channel(address, channel_options()) as one, grpc.insecure_channel(address) as two:
        streams = [channel.unary_stream("/s/stream")(b"", timeout=120) for channel in (one, two)]
        for stream in streams:
            assert next(stream) == b"1"
        refused = two.unary_stream("/s/stream")(b"", timeout=120)
        with pytest.raises(grpc.RpcError):
            next(refused)
        assert refused.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert (
            "host ipv4:127.0.0.1 has 2 streams open, which is the limit (streams_per_client of MX_SERVER_LIMITS)"
            in refused.details()
        )
        assert one.unary_unary("/s/call")(b"", timeout=120) == b""  # other calls go on
        waiting = [two.unary_stream(ENSURE)(b"", timeout=120) for _ in range(3)]  # so do those who wait for downloads
        assert [next(one) for one in waiting] == [b"1"] * 3
        handler.open.set()
        for stream in streams:
            assert list(stream) == []
        assert list(one.unary_stream("/s/stream")(b"", timeout=120)) == [b"1"]


def test_calls_beyond_the_limit_are_refused_and_not_queued(start_server: StartServer) -> None:
    server = start_server(limits="calls=1")
    with (
        ServerClient(f"127.0.0.1:{server.port}", credentials=PLAIN) as client,
        socket.create_connection(("127.0.0.1", server.port)) as other,
    ):
        other.sendall(half_of_a_call())
        while not server._grpc._state.active_rpc_count:  # type: ignore[attr-defined] # it holds the one call by then
            assert other.fileno() >= 0
        assert "RESOURCE_EXHAUSTED" in next(refusal for _ in range(10_000) if (refusal := _refusal(client)))
        other.close()
        assert any(not _refusal(client) for _ in range(10_000)), "the call that was cut is still counted"


def _refusal(client: ServerClient) -> str:
    try:
        client.health()
    except ServerRefused as error:
        return str(error)
    return ""


def test_lines_about_refusals_are_limited_by_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(refusals.time, "monotonic", lambda: now[0])
    lines = refusals.LineLimit()
    assert [lines.take("a") for _ in range(refusals.LINES)] == [0] * refusals.LINES
    assert [lines.take("a") for _ in range(500)] == [None] * 500
    assert lines.take("b") == 0
    now[0] += refusals.LINE_SECONDS
    assert (lines.take("a"), lines.take("a")) == (500, 0)


def test_refusals_fill_no_log(start_server: StartServer, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    server = start_server(auth="file", auth_file=access_file(tmp_path / "access.toml", ("x", "read", "t" * 40)))
    with ServerClient(f"127.0.0.1:{server.port}", credentials=PLAIN) as client:
        for _ in range(3 * refusals.LINES):
            with pytest.raises(ServerRefused, match="UNAUTHENTICATED"):
                client.list_sources()
    assert caplog.text.count("call refused") <= 2 * refusals.LINES


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"host": "127.0.0.1"}, None),
        ({"host": "::1"}, None),
        ({"host": "localhost"}, None),
        ({}, "NOT PROTECTED: whoever reaches 0.0.0.0"),
        ({"tls_cert_file": "/c", "tls_key_file": "/k"}, "NOT PROTECTED"),
        ({"auth": "file", "auth_file": "/a"}, "tokens are taken over connections that are not encrypted"),
        ({"auth": "file", "auth_file": "/a", "tls_cert_file": "/c", "tls_key_file": "/k"}, None),
        ({"tls_cert_file": "/c", "tls_key_file": "/k", "tls_client_ca_file": "/ca"}, None),
    ],
)
def test_server_that_others_can_reach_unprotected_says_so(flags: dict[str, str], words: str | None) -> None:
    warning = setup.warning(load_settings(flags))
    assert (warning is None) is (words is None)
    assert words is None or words in str(warning)

"""Streamed calls of our own against grpcio's server: messages, ends, errors, TLS and tokens."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from concurrent import futures
from contextlib import suppress
from pathlib import Path

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mxserver.wire import FileRefused, SettingError
from mxserver.wire.credentials import ClientCredentials
from mxserver.wire.files import ChunkReader, StreamConnection
from mxserver.wire.files.stream_call import CallFailed
from mxserver.wire.proto import model_pb2
from tests.models.conftest import pattern
from tests.security.authority import Authority

METHOD = "/test.Service/Stream"
SIZES = (0, 1, 4, 5, 65_535, 5_000_003, 0, 17)


class Service:
    """Answers by what the request says: messages of some sizes, an error, or nothing until it is let go."""

    def __init__(self) -> None:
        self.metadata: list[dict[str, str | bytes]] = []
        self.messages: list[bytes] = []
        self.goes_on = threading.Event()
        self.left = threading.Event()

    def stream(self, request: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        self.metadata.append(dict(context.invocation_metadata()))
        what, _, rest = request.decode().partition(" ")
        if what == "sizes":
            yield from (pattern(int(size)) for size in rest.split())
        elif what == "given":
            yield from self.messages
        elif what == "fail":
            yield b"before"
            context.abort(grpc.StatusCode.DATA_LOSS, "100 % „kaputt“\n")
        elif what == "refuse":
            context.abort(grpc.StatusCode.NOT_FOUND, "no such thing")
        elif what == "wait":
            context.add_callback(self.left.set)
            yield b"before"
            self.goes_on.wait(60)


@pytest.fixture
def service() -> Iterator[Service]:
    made = Service()
    yield made
    made.goes_on.set()


@pytest.fixture
def server(service: Service) -> Iterator[grpc.Server]:
    made = grpc.server(futures.ThreadPoolExecutor(4))
    handler = grpc.unary_stream_rpc_method_handler(service.stream)
    made.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Service", {"Stream": handler}),))
    yield made
    service.goes_on.set()
    made.stop(None).wait()


@pytest.fixture
def address(server: grpc.Server) -> str:
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    return f"127.0.0.1:{port}"


@pytest.fixture
def connection(address: str) -> Iterator[StreamConnection]:
    with StreamConnection(address, ClientCredentials()) as opened:
        yield opened


def messages(connection: StreamConnection) -> list[bytes]:
    got = []
    while (size := connection.next_message()) is not None:
        message = bytearray(size)
        connection.read_into(memoryview(message))
        got.append(bytes(message))
    return got


def failure(connection: StreamConnection) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(CallFailed) as failed:
        messages(connection)
    return failed.value.code(), failed.value.details()


def test_messages_of_any_size_and_several_calls(connection: StreamConnection) -> None:
    for _ in range(3):
        connection.call(METHOD, b"sizes " + " ".join(map(str, SIZES)).encode())
        got = messages(connection)
        assert [len(message) for message in got] == list(SIZES)
        assert all(message == pattern(len(message)) for message in got)


def test_message_in_pieces(connection: StreamConnection) -> None:
    connection.call(METHOD, b"sizes 100000")
    assert connection.next_message() == 100_000
    got = bytearray(100_000)
    for begin in range(0, 100_000, 33_333):
        connection.read_into(memoryview(got)[begin : begin + 33_333])
    assert got == pattern(100_000)
    with pytest.raises(ValueError, match="0 bytes left"):
        connection.read_into(memoryview(bytearray(1)))
    assert connection.next_message() is None


def test_unread_message_is_an_error_of_the_caller(connection: StreamConnection) -> None:
    connection.call(METHOD, b"sizes 10 10")
    assert connection.next_message() == 10
    with pytest.raises(ValueError, match="10 bytes"):
        connection.next_message()


def test_errors_carry_status_and_text(connection: StreamConnection) -> None:
    connection.call(METHOD, b"fail")
    assert failure(connection) == (grpc.StatusCode.DATA_LOSS, "100 % „kaputt“\n")
    connection.call(METHOD, b"refuse")
    assert failure(connection) == (grpc.StatusCode.NOT_FOUND, "no such thing")
    connection.call("/test.Service/None", b"")
    assert failure(connection)[0] is grpc.StatusCode.UNIMPLEMENTED
    connection.call(METHOD, b"sizes 3")  # the connection is made again
    assert messages(connection) == [pattern(3)]


def test_call_that_is_given_up(connection: StreamConnection, service: Service) -> None:
    connection.call(METHOD, b"wait")
    assert connection.next_message() == 6
    connection.call(METHOD, b"sizes 1")
    assert messages(connection) == [pattern(1)]
    assert service.left.wait(60)


def test_abort_from_another_thread(connection: StreamConnection, service: Service) -> None:
    connection.call(METHOD, b"wait")
    assert connection.next_message() == 6
    connection.read_into(memoryview(bytearray(6)))
    aborting = threading.Timer(0.05, connection.abort)
    aborting.start()
    assert failure(connection)[0] is grpc.StatusCode.UNAVAILABLE
    aborting.join()
    assert service.left.wait(60)
    with pytest.raises(CallFailed, match="closed"):
        connection.next_message()


def test_server_that_stops(connection: StreamConnection, server: grpc.Server, service: Service) -> None:
    connection.call(METHOD, b"wait")
    assert connection.next_message() == 6
    connection.read_into(memoryview(bytearray(6)))
    stopping = threading.Thread(target=lambda: server.stop(0).wait())
    stopping.start()
    assert failure(connection)[0] in (grpc.StatusCode.CANCELLED, grpc.StatusCode.UNAVAILABLE)
    service.goes_on.set()
    stopping.join()


def test_nobody_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    connection = StreamConnection(f"127.0.0.1:{port}", ClientCredentials())
    with pytest.raises(CallFailed, match="refused") as failed:
        connection.call(METHOD, b"")
    assert failed.value.code() is grpc.StatusCode.UNAVAILABLE


def test_server_that_is_no_grpc_server() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            near, _ = listener.accept()
            with near:
                near.recv(100)
                near.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
                with suppress(OSError):  # the client has left
                    near.shutdown(socket.SHUT_WR)
                    while near.recv(65_536):
                        pass

        thread = threading.Thread(target=answer)
        thread.start()
        with StreamConnection(f"127.0.0.1:{listener.getsockname()[1]}", ClientCredentials()) as connection:
            connection.call(METHOD, b"")
            assert failure(connection)[0] is grpc.StatusCode.UNAVAILABLE
        thread.join()


def secured(server: grpc.Server, authority: Authority, *, ask_clients: bool = False) -> str:
    cert, key = authority.issue("server", "localhost")
    ca = authority.ca_file.read_bytes()
    pair = [(key.read_bytes(), cert.read_bytes())]
    made = grpc.ssl_server_credentials(pair, ca if ask_clients else None, require_client_auth=ask_clients)
    port = server.add_secure_port("127.0.0.1:0", made)
    server.start()
    return f"https://localhost:{port}"


def test_over_tls_with_a_token(server: grpc.Server, service: Service, tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    address = secured(server, authority)
    token = tmp_path / "token"
    token.write_text("first\n")
    credentials = ClientCredentials(ca_file=authority.ca_file, token_file=token)
    with StreamConnection(address, credentials) as connection:
        for word in ("first", "second"):
            token.write_text(word)
            connection.call(METHOD, b"sizes 5000003 1")
            assert messages(connection) == [pattern(5_000_003), pattern(1)]
    assert [metadata["authorization"] for metadata in service.metadata] == ["Bearer first", "Bearer second"]


def test_client_certificate(server: grpc.Server, tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    address = secured(server, authority, ask_clients=True)
    cert, key = authority.issue("client")
    known = ClientCredentials(ca_file=authority.ca_file, cert_file=cert, key_file=key)
    with StreamConnection(address, known) as connection:
        connection.call(METHOD, b"sizes 1")
        assert messages(connection) == [pattern(1)]
    unknown = StreamConnection(address, ClientCredentials(ca_file=authority.ca_file))
    with pytest.raises(CallFailed) as failed:  # which of the two notices is a matter of time
        _ = unknown.call(METHOD, b"sizes 1"), messages(unknown)
    assert failed.value.code() is grpc.StatusCode.UNAVAILABLE


def test_server_that_is_not_trusted(server: grpc.Server, tmp_path: Path) -> None:
    address = secured(server, Authority(tmp_path))
    (tmp_path / "other").mkdir()
    stranger = Authority(tmp_path / "other", "stranger")
    for credentials in (ClientCredentials(ca_file=stranger.ca_file), ClientCredentials()):
        with StreamConnection(address, credentials) as connection, pytest.raises(CallFailed, match="CERTIFICATE"):
            connection.call(METHOD, b"")


def test_token_is_not_sent_in_clear_to_others(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("secret")
    credentials = ClientCredentials(token_file=tmp_path / "token")
    assert credentials.authorization("mx-server:8001") is None
    assert credentials.authorization("localhost:8001") == "Bearer secret"
    assert credentials.authorization("https://mx-server:8001") == "Bearer secret"
    assert ClientCredentials(token_file=tmp_path / "token", token_in_clear=True).authorization("h:1") == "Bearer secret"
    (tmp_path / "token").unlink()
    with pytest.raises(SettingError, match="token file"):
        credentials.authorization("localhost:8001")


CHUNK = model_pb2.FileChunk(relative_path="a/b.json", data=b"d" * 5000, offset=7, total_size=9000, digest="xxh3-64:0")


def read_all(connection: StreamConnection, sent: list[bytes], service: Service) -> list[model_pb2.FileChunk]:
    service.messages = sent
    connection.call(METHOD, b"given")
    reader = ChunkReader(connection)
    got = []
    while (fields := reader.next_fields()) is not None:
        data = bytearray(reader.data_bytes)
        reader.read_into(memoryview(data))
        fields.data = bytes(data)
        got.append(fields)
    return got


def data_last(chunk: model_pb2.FileChunk) -> bytes:
    fields = model_pb2.FileChunk()
    fields.CopyFrom(chunk)
    fields.ClearField("data")
    return fields.SerializeToString() + model_pb2.FileChunk(data=chunk.data).SerializeToString()


def test_chunks_in_whatever_order_their_fields_come(connection: StreamConnection, service: Service) -> None:
    long = model_pb2.FileChunk(relative_path="x" * 3000, data=b"abc", digest="y" * 3000)
    none = model_pb2.FileChunk(relative_path="README.md", is_last_chunk=True)
    chunks = [CHUNK, none, long, model_pb2.FileChunk()]
    assert read_all(connection, [chunk.SerializeToString() for chunk in chunks], service) == chunks
    assert read_all(connection, [data_last(chunk) for chunk in chunks], service) == chunks
    twice = model_pb2.FileChunk(data=b"dropped").SerializeToString() + data_last(CHUNK)
    assert read_all(connection, [twice], service) == [CHUNK]  # the last value of a field counts


@pytest.mark.parametrize(
    "sent", [b"\xff" * 20, b"\x12\x05abc", b"\x0b", b"\x0a\x01\xff\x12\x00", data_last(CHUNK)[:-1]]
)
def test_bytes_that_are_no_chunk(connection: StreamConnection, service: Service, sent: bytes) -> None:
    with pytest.raises(FileRefused):
        read_all(connection, [sent], service)


class Canned:
    """One message, as a call gives it."""

    def __init__(self, message: bytes) -> None:
        self._left = message
        self._begun = False

    def next_message(self) -> int | None:
        begun, self._begun = self._begun, True
        return None if begun else len(self._left)

    def read_into(self, view: memoryview) -> None:
        view[:], self._left = self._left[: len(view)], self._left[len(view) :]


@given(
    st.lists(
        st.sampled_from(
            [
                model_pb2.FileChunk(relative_path="p" * 40),
                model_pb2.FileChunk(data=b"0123456789" * 300),
                model_pb2.FileChunk(offset=2**60, total_size=3),
                model_pb2.FileChunk(is_last_chunk=True, commit_hash="c" * 40),
                model_pb2.FileChunk(digest="d" * 2000, data_digest=2**63),
            ]
        ),
        max_size=6,
    )
)
def test_any_order_is_what_protobuf_parses(parts: list[model_pb2.FileChunk]) -> None:
    message = b"".join(part.SerializeToString() for part in parts)
    reader = ChunkReader(Canned(message))  # type: ignore[arg-type]
    fields = reader.next_fields()
    assert fields is not None
    data = bytearray(reader.data_bytes)
    reader.read_into(memoryview(data))
    if data:
        fields.data = bytes(data)
    assert fields == model_pb2.FileChunk.FromString(message)
    assert reader.next_fields() is None

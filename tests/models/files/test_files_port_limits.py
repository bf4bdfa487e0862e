"""What the port for files bounds: connections of a host, silent ones, the drain; and what it remembers of digests."""

from __future__ import annotations

import http.client
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
import xxhash

from mxbench.stand_ins.authority import Authority
from mxserver.files_port import FilesPort
from mxserver.models import CacheSettings, OpenCache
from mxserver.wire.credentials import ClientCredentials, ServerTls
from mxserver.wire.files import FileSource, PortState
from mxserver.wire.files.http_files import HttpFiles
from mxserver.wire.files.model_client import ModelClient
from mxserver.wire.files.pieces import CallFailed, FilesPlace
from mxserver.wire.proto import model_pb2
from tests.models.conftest import FILES, REPOSITORY, StartServer
from tests.server.conftest import ServerProcess

LARGE = "model-00001-of-00002.safetensors"
MANY_BYTES = 48 * 1024 * 1024  # more than the buffers of two sockets hold


class Port:
    """A port for files in this process, over the cache of a server that has filled it."""

    def __init__(
        self,
        opened: OpenCache,
        path: str,
        *,
        most_per_host: int = 64,
        silence_seconds: float = 10.0,
        tls: tuple[ServerTls, Path] | None = None,
    ) -> None:
        """`tls`: the server's files, and the CA that its clients trust."""
        self.files = FilesPort(
            "127.0.0.1",
            0,
            opened,
            tls=tls[0] if tls else None,
            most_per_host=most_per_host,
            silence_seconds=silence_seconds,
        )
        self.path = path
        self._known = ClientCredentials(ca_file=tls[1]) if tls else None
        self.files.start()

    def source(self) -> HttpFiles:
        """Our client."""
        address = "127.0.0.1:1" if self._known is None else "https://localhost:1"
        return HttpFiles(address, self._known or ClientCredentials(), FilesPlace(self.files.port, self.path))

    def connected(self) -> http.client.HTTPConnection:
        made = (
            http.client.HTTPConnection("localhost", self.files.port, timeout=60)
            if self._known is None
            else http.client.HTTPSConnection(
                "localhost", self.files.port, timeout=60, context=self._known.ssl_context()
            )
        )
        made.connect()
        return made


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[OpenCache, str]]:
    scratch = tmp_path_factory.mktemp("limits")
    source = scratch / "sources" / "model"
    source.mkdir(parents=True)
    (source / "config.json").write_bytes(FILES["config.json"])
    with (source / "big.bin").open("wb") as big:
        big.truncate(MANY_BYTES)
    cache = scratch / "cache"
    process = ServerProcess(
        "--port",
        "0",
        "--file-sources",
        str(source.parent),
        "--cache-dir",
        str(cache),
        environ={"MX_METADATA_BACKEND": "memory"},
    )
    try:
        with ModelClient(process.address) as client:
            client.ensure(f"file://{source}")
            place = client.list_files(f"file://{source}").place
        assert place
    finally:
        process.close()
    made = OpenCache(CacheSettings(cache), lambda _: None)
    yield made, place.path
    made.close()


@pytest.fixture(params=["plain", "tls"])
def port(
    opened: tuple[OpenCache, str], request: pytest.FixtureRequest, tmp_path: Path
) -> Iterator[Callable[..., Port]]:
    started: list[Port] = []
    tls = None
    if request.param == "tls":
        authority = Authority(tmp_path)
        tls = ServerTls(*authority.issue("server", "localhost")), authority.ca_file

    def start(**limits: float) -> Port:
        started.append(Port(*opened, tls=tls, **limits))  # type: ignore[arg-type]
        return started[-1]

    yield start
    for one in started:
        one.files.stop()


def body_of(connection: http.client.HTTPConnection, path: str, **headers: str) -> bytes:
    connection.request("GET", path, headers=headers)
    answer = connection.getresponse()
    assert answer.status in (200, 206), answer.status
    return answer.read()


@pytest.mark.parametrize("port", ["plain"], indirect=True)
def test_a_host_has_so_many_connections_and_no_more(port: Callable[..., Port]) -> None:
    limited = port(most_per_host=2)
    path = limited.path + "config.json"
    first, second, third = (limited.connected() for _ in range(3))
    for allowed in (first, second):
        assert body_of(allowed, path) == FILES["config.json"]
    with pytest.raises((OSError, http.client.HTTPException)):
        body_of(third, path)
    first.close()
    for _ in range(1000):  # the server sees the end of the first connection at some time
        again = limited.connected()
        try:
            assert body_of(again, path) == FILES["config.json"]
            break
        except (OSError, http.client.HTTPException):
            again.close()
    else:
        raise AssertionError("the place of a closed connection was not given to another one")
    for one in (second, third, again):
        one.close()


def test_who_asks_nothing_is_cut(port: Callable[..., Port]) -> None:
    limited = port(silence_seconds=0.2)
    for sent in (b"", b"GET /files/"):
        connection = limited.connected()
        connection.sock.sendall(sent)
        assert connection.sock.recv(1) == b""
        connection.close()


@pytest.mark.parametrize("port", ["tls"], indirect=True)
@pytest.mark.parametrize("trickles", [False, True])
def test_who_does_not_shake_hands_is_cut(port: Callable[..., Port], trickles: bool) -> None:
    """Also who sends a byte now and then: the time is for the whole handshake."""
    client = socket.create_connection(("127.0.0.1", port(silence_seconds=0.3).files.port), timeout=60)
    client.sendall(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc")  # a ClientHello of 512 bytes begins
    if trickles:
        client.settimeout(0.05)
    for _ in range(500):
        try:
            assert client.recv(100) in (b"", b"\x15\x03\x01\x00\x02\x02\x32")
            break
        except ConnectionResetError:
            break
        except TimeoutError:
            client.sendall(b"\x03")
    else:
        raise AssertionError("the server waits for the rest of the handshake")
    client.close()


def test_who_takes_nothing_is_cut(port: Callable[..., Port]) -> None:
    limited = port(silence_seconds=0.2)
    connection = limited.connected()
    connection.request("GET", limited.path + "big.bin")
    answer = connection.getresponse()
    assert limited.files.wait(60)  # nothing is under way, though the client has read no byte
    with pytest.raises((http.client.IncompleteRead, ConnectionError)):
        answer.read()
    connection.close()


def test_drain_ends_answers_first(port: Callable[..., Port]) -> None:
    draining = port(silence_seconds=120)  # the idle connection is not cut for its silence, however slow the machine
    busy, idle = draining.connected(), draining.connected()
    assert body_of(idle, draining.path + "config.json") == FILES["config.json"]
    assert draining.files.wait(60)  # that answer is over, and not one that the drain meets
    busy.request("GET", draining.path + "big.bin")
    answer = busy.getresponse()
    draining.files.drain()
    with pytest.raises(OSError, match="refused"):
        draining.connected()
    assert not draining.files.wait(0)
    assert len(answer.read()) == MANY_BYTES
    assert draining.files.wait(60)
    assert body_of(idle, draining.path + "config.json") == FILES["config.json"]  # one more, and it was the last
    assert idle.sock.recv(1) == b""
    draining.files.stop()
    busy.close()
    idle.close()


def test_sigterm_leaves_an_answer_its_time(start_server: StartServer, tmp_path: Path) -> None:
    source = tmp_path / "sources" / "model"
    source.mkdir(parents=True)
    with (source / "big.bin").open("wb") as big:
        big.truncate(MANY_BYTES)
    process = start_server("--file-sources", str(source.parent), "--drain", "100")
    with ModelClient(process.address) as client:
        client.ensure(f"file://{source}")
        place = client.list_files(f"file://{source}").place
    assert place
    connection = http.client.HTTPConnection("127.0.0.1", place.port, timeout=60)
    connection.request("GET", place.path + "big.bin")
    answer = connection.getresponse()
    process.signal(signal.SIGTERM)
    process.wait_for("draining")
    while not refused(place.port):
        pass
    assert len(answer.read()) == MANY_BYTES
    assert process.wait() == 0
    connection.close()


def refused(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port)).close()
    except ConnectionRefusedError:
        return True
    return False


def test_a_file_that_changed_since_it_was_listed_is_not_mixed(warm_server: str) -> None:
    """If-Range: the rest of another file does not go behind the beginning of this one."""
    request = model_pb2.ModelFilesRequest(model_name=REPOSITORY, provider=model_pb2.HUGGING_FACE)
    with ModelClient(warm_server) as client:
        place = client.list_files(REPOSITORY).place
    with FileSource(warm_server, None, request, place, PortState(warm_server)) as source:
        with pytest.raises(CallFailed, match="has changed since it was listed") as caught:
            list(source.blocks(LARGE, 1000, 500, "xxh3-64:0123456789abcdef"))
        assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        digest = f"xxh3-64:{xxhash.xxh3_64_hexdigest(FILES[LARGE])}"
        assert (
            b"".join(bytes(piece.data) for piece in source.blocks(LARGE, 1000, 500, digest)) == FILES[LARGE][1000:1500]
        )


def test_a_digest_of_bytes_read_wrong_is_made_again(port: Callable[..., Port], monkeypatch: pytest.MonkeyPatch) -> None:
    """What is remembered does not refuse right bytes for ever."""
    one = port()
    digests = one.files._server.shared.digests
    source = one.source()
    into = memoryview(bytearray(20_000_000))

    def right() -> list[bool]:
        return [piece.digest == piece.received for piece in source.pieces("big.bin", 5_000_000, into)]

    try:
        assert right() == [True] * 3  # to 8, 16, 24 MiB of the file
        for key in digests._made:
            digests._made[key] = f"{1:016x}"
        assert right() == [False] * 3
        assert right() == [True] * 3
        assert right() == [True] * 3
    finally:
        source.close()


def test_rest_of_an_answer_is_not_taken_for_the_next(port: Callable[..., Port]) -> None:
    source = port().source()
    into = memoryview(bytearray(20_000_000))
    try:
        for piece in source.pieces("big.bin", 0, into):
            assert len(piece.data) == 8 * 1024 * 1024
            break
        (config,) = source.pieces("config.json", 0, into[: len(FILES["config.json"])])
        assert bytes(config.data) == FILES["config.json"]
        next(source.blocks("big.bin", 0, MANY_BYTES, ""))
        (config,) = source.blocks("config.json", 0, len(FILES["config.json"]), "")
        assert bytes(config.data) == FILES["config.json"]
    finally:
        source.close()

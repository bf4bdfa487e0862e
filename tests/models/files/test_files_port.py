"""Files by HTTP: ranges, resume, refusals, tokens and TLS; and gRPC where the port for files cannot be reached."""

from __future__ import annotations

import http.client
import http.server
import logging
import resource
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import xxhash

from mxbench.stand_ins.authority import Authority
from mxbench.stand_ins.hub import HubStandIn
from mxbench.stand_ins.tcp_proxy import TcpProxy
from mxserver.wire import ServerRefused
from mxserver.wire.credentials import ClientCredentials
from mxserver.wire.files import ModelClient
from mxserver.wire.files.http_files import HttpFiles
from mxserver.wire.files.pieces import CallFailed, FilesPlace
from tests.models.conftest import FILE_DIGESTS, FILES, REPOSITORY, StartServer, digest_of, digests_of, files_below
from tests.security.conftest import access_file

LARGE = "model-00001-of-00002.safetensors"
SLOWER = "come over gRPC, which is slower"


@pytest.fixture
def client(warm_server: str) -> Iterator[ModelClient]:
    with ModelClient(warm_server, patience_seconds=20) as opened:
        yield opened


def place_of(client: ModelClient) -> FilesPlace:
    place = client.list_files(REPOSITORY).place
    assert place
    return place


@pytest.fixture
def connection(client: ModelClient) -> Iterator[http.client.HTTPConnection]:
    made = http.client.HTTPConnection("127.0.0.1", place_of(client).port, timeout=60)
    yield made
    made.close()


Get = Callable[..., tuple[int, http.client.HTTPMessage, bytes]]


@pytest.fixture
def get(connection: http.client.HTTPConnection, client: ModelClient) -> Get:
    folder = place_of(client).path

    def ask(path: str, method: str = "GET", **headers: str) -> tuple[int, http.client.HTTPMessage, bytes]:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path if path.startswith("/") else folder + path, headers=named)
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()

    return ask


def test_whole_files_and_ranges_over_one_connection(get: Get) -> None:
    for path, data in FILES.items():
        status, headers, body = get(path)
        assert (status, digest_of(body)) == (200, FILE_DIGESTS[path])
        assert headers["ETag"] == f'"xxh3-64:{xxhash.xxh3_64_hexdigest(data)}"'
    data = FILES[LARGE]
    status, headers, body = get(LARGE, Range="bytes=10-20", MX_Want_Digest="xxh3-64")  # any client reads its chunks
    assert (status, body, headers["Content-Range"]) == (206, data[10:21], f"bytes 10-20/{len(data)}")
    assert get(LARGE, Range=f"bytes={len(data) - 3}-")[2] == data[-3:]
    status, headers, body = get(LARGE, "HEAD")
    assert (status, headers["Content-Length"], body) == (200, str(len(data)), b"")
    tag = headers["ETag"]
    assert get(LARGE, Range="bytes=0-9", If_Range=tag)[0] == 206
    status, _, body = get(LARGE, Range="bytes=0-9", If_Range='"another"')
    assert (status, len(body)) == (200, len(data))


@pytest.mark.parametrize(
    ("path", "headers", "code", "status"),
    [
        ("none.json", {}, 404, "NOT_FOUND"),
        ("../config.json", {}, 400, "INVALID_ARGUMENT"),
        ("..%2Fconfig.json", {}, 400, "INVALID_ARGUMENT"),
        ("%2Fetc%2Fpasswd", {}, 400, "INVALID_ARGUMENT"),
        ("config.json", {"Range": "bytes=5-1000000"}, 416, "INVALID_ARGUMENT"),
        ("/files/HUGGING_FACE/org%2Fother//config.json", {}, 404, "NOT_FOUND"),
        ("/files/NOBODY/org%2Fother//config.json", {}, 400, "INVALID_ARGUMENT"),
        ("/metrics", {}, 404, "NOT_FOUND"),
    ],
)
def test_refusals(get: Get, path: str, headers: dict[str, str], code: int, status: str) -> None:
    found, answered, body = get(path, **headers)
    assert (found, answered["MX-Status"]) == (code, status)
    assert body
    assert get("config.json")[0] == 200  # the connection goes on


def test_cut_answer_goes_on_where_it_was(client: ModelClient, tmp_path: Path) -> None:
    with (
        TcpProxy(f"127.0.0.1:{place_of(client).port}") as proxy,
        ModelClient(client.address, patience_seconds=60, files_port=proxy.port) as through,
    ):
        proxy.cut_after(1_700_000)
        report = through.fetch(REPOSITORY, tmp_path / "to", streams=1)
        assert proxy.cuts == 1
        listed = through.list_files(REPOSITORY)
        proxy.cut_after(1_700_000)
        into = bytearray(len(FILES[LARGE]))
        with through.reader(REPOSITORY, revision=listed.revision, place=listed.place) as reader:
            reader.read_into(LARGE, 0, memoryview(into))
            assert reader.breaks >= 1
            assert reader.bytes_unverified == 0
    assert report.breaks >= 1
    assert report.resent_bytes == 0
    assert report.bytes_received == sum(map(len, FILES.values()))
    assert files_below(tmp_path / "to") == FILE_DIGESTS
    assert digest_of(into) == FILE_DIGESTS[LARGE]


class Cuts(http.server.BaseHTTPRequestHandler):
    """Sends the first 700,000 bytes of what was asked for."""

    def do_GET(self) -> None:
        begin, last = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {begin}-{last}/{len(FILES[LARGE])}")
        self.send_header("Content-Length", str(last + 1 - begin))
        self.end_headers()
        self.wfile.write(FILES[LARGE][begin : min(last + 1, begin + 700_000)])

    def log_message(self, *_: object) -> None:
        pass


def test_a_cut_in_the_middle_of_a_block_loses_no_byte() -> None:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Cuts) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        source = HttpFiles("127.0.0.1:1", ClientCredentials(), FilesPlace(server.server_port, "/"))
        came, cuts = bytearray(), 0
        try:
            while len(came) < len(FILES[LARGE]):
                try:
                    for piece in source.blocks("x", len(came), len(FILES[LARGE]) - len(came), ""):
                        assert piece.offset == len(came)
                        came += piece.data
                except CallFailed:
                    cuts += 1
                    assert len(came) == cuts * 700_000
        finally:
            source.close()
            server.shutdown()
            thread.join()
    assert cuts == len(FILES[LARGE]) // 700_000
    assert bytes(came) == FILES[LARGE]


def by_grpc(client: ModelClient, folder: Path, caplog: pytest.LogCaptureFixture) -> list[str]:
    """What is said while all files come over gRPC, twice."""
    with caplog.at_level(logging.WARNING):
        client.fetch(REPOSITORY, folder / "once")
        client.fetch(REPOSITORY, folder / "twice")
    assert files_below(folder / "once") == files_below(folder / "twice") == FILE_DIGESTS
    return [record.getMessage() for record in caplog.records if SLOWER in record.getMessage()]


def test_closed_port_is_said_once(warm_server: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        closed = taken.getsockname()[1]
    with ModelClient(warm_server, files_port=closed) as client:
        (said,) = by_grpc(client, tmp_path, caplog)
    assert str(closed) in said
    assert "refused" in said


def test_server_without_a_port_for_files_is_said_once(
    start_server: StartServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with ModelClient(start_server("--files-port", "off").address) as client:
        client.ensure(REPOSITORY)
        assert client.list_files(REPOSITORY).place is None
        (said,) = by_grpc(client, tmp_path, caplog)
    assert "no port for files" in said


class Stranger(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_error(404)

    def log_message(self, *_: object) -> None:
        pass


def test_another_server_at_the_port(warm_server: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Stranger) as other:
        thread = threading.Thread(target=other.serve_forever, args=(0.05,))
        thread.start()
        try:
            with ModelClient(warm_server, files_port=other.server_port) as client:
                (said,) = by_grpc(client, tmp_path, caplog)
        finally:
            other.shutdown()
            thread.join()
    assert "404" in said


TOKENS = {"reader": "r" * 40, "worker": "w" * 40}


def test_tls_and_tokens(start_server: StartServer, tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    cert, key = authority.issue("server", "localhost")
    rules = access_file(
        tmp_path / "access.toml", ("reader", "read", TOKENS["reader"]), ("worker", "publish", TOKENS["worker"])
    )
    process = start_server("--tls-cert", str(cert), "--tls-key", str(key), "--auth", "file", "--auth-file", str(rules))
    for role, token in TOKENS.items():
        (tmp_path / role).write_text(token)
    address = f"https://localhost:{process.port}"
    known = {role: ClientCredentials(ca_file=authority.ca_file, token_file=tmp_path / role) for role in TOKENS}
    with ModelClient(address, credentials=known["worker"]) as client:
        client.ensure(REPOSITORY)
    with ModelClient(address, credentials=known["reader"]) as client:
        listed = client.list_files(REPOSITORY)
        assert listed.place
        client.fetch(REPOSITORY, tmp_path / "to")
        assert files_below(tmp_path / "to") == FILE_DIGESTS
        into = bytearray(len(FILES[LARGE]))
        with client.reader(REPOSITORY, revision=listed.revision, place=listed.place) as reader:
            reader.read_into(LARGE, 0, memoryview(into))
            assert not reader.bytes_unverified
        assert digest_of(into) == FILE_DIGESTS[LARGE]
        assert not client._port.is_closed
    context = known["reader"].ssl_context()
    asking = http.client.HTTPSConnection("localhost", listed.place.port, timeout=60, context=context)
    for headers in ({}, {"Authorization": "Bearer " + "x" * 40}):
        asking.request("GET", listed.place.path + "config.json", headers=headers)
        answer = asking.getresponse()
        assert (answer.status, answer.headers["MX-Status"]) == (401, "UNAUTHENTICATED")
        answer.read()
    asking.close()


def test_clients_need_a_certificate_where_calls_do(start_server: StartServer, tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    cert, key = authority.issue("server", "localhost")
    own_cert, own_key = authority.issue("client")
    process = start_server("--tls-cert", str(cert), "--tls-key", str(key), "--tls-client-ca", str(authority.ca_file))
    known = ClientCredentials(ca_file=authority.ca_file, cert_file=own_cert, key_file=own_key)
    with ModelClient(f"https://localhost:{process.port}", credentials=known) as client:
        client.ensure(REPOSITORY)
        place = place_of(client)
        client.fetch(REPOSITORY, tmp_path / "to")
        assert files_below(tmp_path / "to") == FILE_DIGESTS
        assert not client._port.is_closed
    context = ClientCredentials(ca_file=authority.ca_file).ssl_context()
    stranger = http.client.HTTPSConnection("localhost", place.port, timeout=60, context=context)

    def ask() -> None:
        stranger.request("GET", place.path + "config.json")
        stranger.getresponse()

    with pytest.raises((OSError, http.client.HTTPException)):  # which side notices first is a matter of time
        ask()
    stranger.close()


FETCHED = """
import sys, pathlib
from mxcore.storage.remote import ServerFolder, pull_small_files
from mxserver.wire.files import ModelClient
address, name, to, count, *ways = sys.argv[1:]
for way in ways:
    port = 0 if way == "grpc" else None
    with ModelClient(address, files_port=port) as client:
        client.ensure(name)
        assert client.fetch(name, pathlib.Path(to, way)).files == int(count)
        folder = ServerFolder(client, name, client.list_files(name))
        assert pull_small_files(folder, pathlib.Path(to, way + "-reader")) == int(count)
        folder.close()
        client.delete(name)
"""


@pytest.mark.parametrize("source", ["folder", "hub"])
def test_long_names_and_few_handles(source: str, start_server: StartServer, hub: HubStandIn, tmp_path: Path) -> None:
    """Names of 1,000 bytes, more than one message has room for; more files than the client may open."""
    files = {
        f"{'n' * 249}/{'m' * 249}/{'o' * 249}/{number:03}{'x' * 242}.json": b"%d" % number for number in range(100)
    }
    assert {len(name) for name in files} == {1000}
    if source == "hub":
        hub.add("org/many", files)
        name = "org/many"
    else:
        (tmp_path / "sources" / Path(next(iter(files))).parent).mkdir(parents=True)
        for file, data in files.items():
            (tmp_path / "sources" / file).write_bytes(data)
        name = f"file://{tmp_path / 'sources'}"
    process = start_server("--file-sources", str(tmp_path / "sources"))
    subprocess.run(
        [sys.executable, "-c", FETCHED, process.address, name, str(tmp_path / "to"), str(len(files)), "http", "grpc"],
        check=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (96, 96)),
    )
    for way in ("http", "grpc", "http-reader", "grpc-reader"):
        assert files_below(tmp_path / "to" / way) == digests_of(files)


def test_ten_thousand_files_and_few_handles(start_server: StartServer, tmp_path: Path) -> None:
    """Of client and server; files that come one by one, and all of them as a worker's small files."""
    files = {f"{number:05}.json": b"%d" % number for number in range(10_000)}
    (tmp_path / "sources").mkdir()
    for file, data in files.items():
        (tmp_path / "sources" / file).write_bytes(data)
    process = start_server("--file-sources", str(tmp_path / "sources"))
    resource.prlimit(process.process.pid, resource.RLIMIT_NOFILE, (256, 256))
    name = f"file://{tmp_path / 'sources'}"
    subprocess.run(
        [sys.executable, "-c", FETCHED, process.address, name, str(tmp_path / "to"), str(len(files)), "http"],
        check=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256)),
    )
    for way in ("http", "http-reader"):
        assert files_below(tmp_path / "to" / way) == digests_of(files)


def test_file_that_was_cut_on_the_server(start_server: StartServer, cache_folder: Path, tmp_path: Path) -> None:
    with ModelClient(start_server().address) as client:
        client.ensure(REPOSITORY)
        blob = next((cache_folder / "models--org--tiny-1.0" / "snapshots").glob(f"*/{LARGE}")).resolve()
        blob.write_bytes(FILES[LARGE][:-1])
        with pytest.raises(ServerRefused, match="DATA_LOSS"):
            client.fetch(REPOSITORY, tmp_path / "to")

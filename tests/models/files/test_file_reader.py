"""Parts of files into memory of the caller: ranges, breaks, wrong bytes, servers that know less."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from concurrent import futures

import grpc
import pytest
import xxhash

from mxbench.stand_ins.tcp_proxy import TcpProxy
from mxserver.wire import FileRefused, ModelNotFound, ServerRefused, ServerUnreachable
from mxserver.wire.calls import Patience
from mxserver.wire.files import FileReader, ModelClient
from mxserver.wire.proto import model_pb2, model_pb2_grpc
from tests.models.conftest import FILES, REPOSITORY, digest_of

LARGE = "model-00001-of-00002.safetensors"
MIB = 1024 * 1024


@pytest.fixture
def client(warm_server: str) -> Iterator[ModelClient]:
    with ModelClient(warm_server, patience_seconds=60) as opened:
        yield opened


@pytest.fixture(params=["http", "grpc"])
def reader(client: ModelClient, request: pytest.FixtureRequest) -> Iterator[FileReader]:
    listed = client.list_files(REPOSITORY)
    place = listed.place if request.param == "http" else None
    assert listed.place
    with client.reader(REPOSITORY, revision=listed.revision, place=place) as opened:
        yield opened


def test_any_range_is_the_files(reader: FileReader) -> None:
    chance = random.Random(5)
    file = FILES[LARGE]
    cuts = sorted(chance.sample(range(len(file)), 6))
    stretches = [(begin, chance.randrange(1, len(file) - begin)) for begin in cuts]
    for begin, length in [(0, 1), (0, len(file)), (len(file) - 1, 1), (MIB - 1, 2), *stretches]:
        into = bytearray(length)
        counted: list[int] = []
        reader.read_into(LARGE, begin, memoryview(into), on_bytes=counted.append)
        assert digest_of(into) == digest_of(file[begin : begin + length])
        assert sum(counted) == length
    assert reader.bytes_unverified == reader.breaks == 0


def test_memory_between_other_memory_and_of_other_items(reader: FileReader) -> None:
    around = bytearray(b"#" * 3_000)
    reader.read_into(LARGE, 500, memoryview(around)[1_000:2_000])
    assert around == b"#" * 1_000 + FILES[LARGE][500:1_500] + b"#" * 1_000
    words = memoryview(bytearray(80)).cast("Q")
    reader.read_into(LARGE, 8, words)
    assert words.tobytes() == FILES[LARGE][8:88]
    reader.read_into(LARGE, 0, memoryview(b"")[:0])
    with pytest.raises(TypeError):
        reader.read_into(LARGE, 0, memoryview(bytes(10)))


def test_what_the_server_does_not_have(reader: FileReader) -> None:
    with pytest.raises(ModelNotFound):
        reader.read_into("none.json", 0, memoryview(bytearray(1)))
    with pytest.raises(ServerRefused, match="but the range from"):
        reader.read_into("config.json", len(FILES["config.json"]) - 1, memoryview(bytearray(2)))
    with pytest.raises(ServerRefused, match="refused"):
        reader.read_into("../config.json", 0, memoryview(bytearray(1)))
    into = bytearray(4)
    reader.read_into("config.json", 0, memoryview(into))
    assert into == FILES["config.json"][:4]


def test_list_says_where_the_server_has_them(client: ModelClient) -> None:
    folder = client.list_files(REPOSITORY).folder
    assert folder
    assert {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} == set(FILES)


def test_break_goes_on_with_the_chunk_that_was_cut(warm_server: str) -> None:
    into = bytearray(len(FILES[LARGE]))
    with TcpProxy(warm_server) as proxy, ModelClient(proxy.address, patience_seconds=60) as client:
        proxy.cut_after(2_400_000)
        with client.reader(REPOSITORY) as reader:
            reader.read_into(LARGE, 0, memoryview(into))
        assert proxy.cuts == 1
        assert reader.breaks >= 1
        assert reader.bytes_received == len(into)
    assert digest_of(into) == digest_of(FILES[LARGE])


def test_server_that_is_gone_for_good(warm_server: str) -> None:
    with TcpProxy(warm_server) as proxy, ModelClient(proxy.address, patience_seconds=0) as client:
        proxy.cut_after(1_000_000, forever=True)
        with client.reader(REPOSITORY) as reader, pytest.raises(ServerUnreachable):
            reader.read_into(LARGE, 0, memoryview(bytearray(len(FILES[LARGE]))))


class OtherServer(model_pb2_grpc.ModelServiceServicer):
    """Sends one file whole, from wherever it was asked for or from its beginning, with digests that may be wrong."""

    def __init__(self) -> None:
        self.knows_ranges = True
        self.digests: list[list[int]] = []  # of each call; none without
        self.calls = 0
        self.gate = threading.Event()
        self.sent_as = "file"
        self.stops_after = 10**9

    def StreamModelFiles(  # noqa: N802
        self, request: model_pb2.ModelFilesRequest, context: grpc.ServicerContext
    ) -> Iterator[model_pb2.FileChunk]:
        self.calls += 1
        digests = self.digests.pop(0) if self.digests else []
        begin = request.ranges[0].offset if self.knows_ranges else 0
        end = begin + request.ranges[0].length if self.knows_ranges else 5_000
        for offset in range(begin, min(end, self.stops_after), 1_000):
            yield model_pb2.FileChunk(
                relative_path=self.sent_as,
                data=b"x" * min(1_000, end - offset),
                offset=offset,
                total_size=5_000,
                is_last_chunk=offset + 1_000 >= end,
                data_digest=digests.pop(0) if digests else None,
            )
        if request.model_name == "org/waits":
            self.gate.wait(60)


@pytest.fixture
def other() -> Iterator[tuple[OtherServer, ModelClient]]:
    service = OtherServer()
    server = grpc.server(futures.ThreadPoolExecutor(4))
    model_pb2_grpc.add_ModelServiceServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with ModelClient(f"127.0.0.1:{port}", patience_seconds=60) as client:
        yield service, client
    service.gate.set()
    server.stop(None).wait()


RIGHT = xxhash.xxh3_64_intdigest(b"x" * 1_000)


def test_server_without_digests(other: tuple[OtherServer, ModelClient]) -> None:
    _, client = other
    into = bytearray(2_500)
    with client.reader("org/x") as reader:
        reader.read_into("file", 1_000, memoryview(into))
        assert reader.bytes_unverified == 2_500
    assert into == b"x" * 2_500


def test_wrong_chunk_is_asked_for_again(other: tuple[OtherServer, ModelClient]) -> None:
    service, client = other
    service.digests = [[RIGHT, 1, RIGHT], [RIGHT, RIGHT]]
    with client.reader("org/x") as reader:
        reader.read_into("file", 0, memoryview(bytearray(3_000)))
        assert reader.bytes_unverified == 0
        assert reader.bytes_received == 3_000  # the first chunk stayed
    assert service.calls == 2


def test_chunk_that_stays_wrong_is_refused(other: tuple[OtherServer, ModelClient]) -> None:
    service, client = other
    service.digests = [[1], [1], [1]]
    with client.reader("org/x") as reader, pytest.raises(FileRefused, match="0000000000000001"):
        reader.read_into("file", 0, memoryview(bytearray(1_000)))
    assert service.calls == 3


def test_server_without_ranges_is_said_to_be_one(other: tuple[OtherServer, ModelClient]) -> None:
    service, client = other
    service.knows_ranges = False
    with client.reader("org/x") as reader:
        with pytest.raises(ServerRefused, match="may not support ranges"):
            reader.read_into("file", 1_000, memoryview(bytearray(1_000)))
        with pytest.raises(ServerRefused, match="may not support ranges"):
            reader.read_into("file", 0, memoryview(bytearray(1_000)))
        reader.read_into("file", 0, memoryview(bytearray(5_000)))


def test_server_that_sends_something_else(other: tuple[OtherServer, ModelClient]) -> None:
    service, client = other
    service.sent_as = "../evil"
    with client.reader("org/x") as reader, pytest.raises(FileRefused, match="not asked for"):
        reader.read_into("file", 0, memoryview(bytearray(1_000)))
    service.sent_as, service.stops_after = "file", 1_000
    with client.reader("org/x") as reader, pytest.raises(ServerUnreachable, match="1000 bytes early"):
        reader.read_into("file", 0, memoryview(bytearray(2_000)))


def test_abort(other: tuple[OtherServer, ModelClient]) -> None:
    service, client = other
    service.stops_after = 1_000
    first = threading.Event()
    with client.reader("org/waits") as reader:
        aborting = threading.Thread(target=lambda: first.wait(60) and reader.abort())
        aborting.start()
        with pytest.raises(ServerUnreachable):
            reader.read_into("file", 0, memoryview(bytearray(2_000)), on_bytes=lambda _: first.set())
        aborting.join()
        with pytest.raises(ServerUnreachable):
            reader.read_into("file", 0, memoryview(bytearray(2_000)))


def test_stop_ends_a_wait() -> None:
    stop = threading.Event()
    stop.set()
    assert not Patience(3600, stop).wait()


def test_patience_has_an_end() -> None:
    patience = Patience(0.01)
    assert not all(patience.wait() for _ in range(1_000))
    assert not Patience(0).wait()


def test_sign_of_life_begins_the_patience_anew() -> None:
    patience = Patience(3600)
    assert patience.wait()
    patience.heard()
    assert patience.wait()

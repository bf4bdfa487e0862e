"""Streams of model files, from the server and into folders."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path

import grpc
import pytest
import xxhash

from mxbench.stand_ins.tcp_proxy import TcpProxy
from mxserver.wire import FileRefused, ModelNotFound, ServerRefused, ServerUnreachable
from mxserver.wire.calls import channel_options
from mxserver.wire.files import ModelClient
from mxserver.wire.proto import model_pb2, model_pb2_grpc
from tests.models.conftest import (
    FILE_DIGESTS,
    FILES,
    REPOSITORY,
    WEIGHTS,
    StartServer,
    digest_of,
    digests_of,
    files_below,
)

LARGE = "model-00001-of-00002.safetensors"
MIB = 1024 * 1024


@pytest.fixture
def ready(warm_server: str) -> Iterator[ModelClient]:
    with ModelClient(warm_server, patience_seconds=20) as client:
        yield client


def request(**fields: object) -> model_pb2.ModelFilesRequest:
    return model_pb2.ModelFilesRequest(model_name=REPOSITORY, **fields)  # type: ignore[arg-type]


@pytest.fixture
def stub(ready: ModelClient) -> Iterator[model_pb2_grpc.ModelServiceStub]:
    with grpc.insecure_channel(ready.address, options=channel_options()) as channel:
        yield model_pb2_grpc.ModelServiceStub(channel)


def test_stream_has_the_protocols_shape(stub: model_pb2_grpc.ModelServiceStub, ready: ModelClient) -> None:
    chunks = list(stub.StreamModelFiles(request()))
    got: dict[str, bytes] = {}
    for chunk in chunks:
        assert chunk.offset == len(got.setdefault(chunk.relative_path, b""))
        assert chunk.total_size == len(FILES[chunk.relative_path])
        got[chunk.relative_path] += chunk.data
        assert chunk.is_last_chunk == (len(got[chunk.relative_path]) == chunk.total_size)
    assert digests_of(got) == FILE_DIGESTS
    assert [chunk.is_last_file for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert chunks[0].commit_hash == ready.list_files(REPOSITORY).revision
    assert not any(chunk.HasField("commit_hash") for chunk in chunks[1:])
    digests = {chunk.relative_path: chunk.digest for chunk in chunks if chunk.HasField("digest")}
    assert digests == {path: f"xxh3-64:{xxhash.xxh3_64_hexdigest(data)}" for path, data in FILES.items()}
    empty = [chunk for chunk in chunks if chunk.relative_path == "README.md"]
    assert len(empty) == 1
    assert empty[0].is_last_chunk


@pytest.mark.parametrize(
    ("asked", "largest"), [(0, MIB), (1, 65536), (65536, 65536), (100_000, 100_000), (2**32 - 1, 8 * MIB)]
)
def test_chunk_size_is_clamped(stub: model_pb2_grpc.ModelServiceStub, asked: int, largest: int) -> None:
    chunks = stub.StreamModelFiles(request(chunk_size=asked, file_selector={"paths": [LARGE]}))
    assert max(len(chunk.data) for chunk in chunks) == min(largest, len(FILES[LARGE]))


def test_selection_and_ranges(stub: model_pb2_grpc.ModelServiceStub) -> None:
    light = {chunk.relative_path for chunk in stub.StreamModelFiles(request(ignore_weights=True))}
    assert light == set(FILES) - WEIGHTS
    ranges = [model_pb2.FileRange(relative_path=LARGE, offset=2_999_990, length=5)]
    chunks = list(stub.StreamModelFiles(request(file_selector={"paths": [LARGE, "config.json"]}, ranges=ranges)))
    assert [chunk.relative_path for chunk in chunks] == ["config.json", LARGE]
    assert chunks[1].data == FILES[LARGE][2_999_990:2_999_995]
    assert chunks[1].offset == 2_999_990
    assert chunks[1].is_last_chunk
    assert chunks[1].is_last_file


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({"file_selector": {"paths": ["missing.json"]}}, grpc.StatusCode.NOT_FOUND),
        ({"file_selector": {"paths": ["../../../etc/passwd"]}}, grpc.StatusCode.INVALID_ARGUMENT),
        ({"file_selector": {"paths": ["/etc/passwd"]}}, grpc.StatusCode.INVALID_ARGUMENT),
        ({"ranges": [{"relative_path": LARGE, "offset": 3_000_002}]}, grpc.StatusCode.INVALID_ARGUMENT),
        ({"ranges": [{"relative_path": LARGE, "length": 3_000_002}]}, grpc.StatusCode.INVALID_ARGUMENT),
        ({"ranges": [{"relative_path": LARGE}] * 2}, grpc.StatusCode.INVALID_ARGUMENT),
        ({"ranges": [{"relative_path": "none"}]}, grpc.StatusCode.INVALID_ARGUMENT),
        ({"revision": "elsewhere"}, grpc.StatusCode.NOT_FOUND),
        ({"provider": model_pb2.NGC}, grpc.StatusCode.INVALID_ARGUMENT),
        ({"provider": 77}, grpc.StatusCode.INVALID_ARGUMENT),
    ],
)
def test_requests_that_are_refused(
    stub: model_pb2_grpc.ModelServiceStub, fields: dict[str, object], status: grpc.StatusCode
) -> None:
    with pytest.raises(grpc.RpcError) as refused:
        list(stub.StreamModelFiles(request(**fields)))
    assert refused.value.code() is status


def test_fetch_brings_everything_checked(ready: ModelClient, tmp_path: Path) -> None:
    seen: list[int] = []
    report = ready.fetch(REPOSITORY, tmp_path / "to", on_bytes=seen.append)
    assert files_below(tmp_path / "to") == FILE_DIGESTS
    assert report.files == report.files_verified == len(FILES)
    assert report.bytes_received == sum(seen) == sum(map(len, FILES.values()))
    again = ready.fetch(REPOSITORY, tmp_path / "to")
    assert (again.files, again.files_kept, again.bytes_received) == (0, len(FILES), 0)


def test_fetch_replaces_what_is_damaged(ready: ModelClient, tmp_path: Path) -> None:
    ready.fetch(REPOSITORY, tmp_path)
    damaged = bytearray(FILES[LARGE])
    damaged[1_234_567] ^= 1
    (tmp_path / LARGE).write_bytes(damaged)
    report = ready.fetch(REPOSITORY, tmp_path)
    assert report.files == 1
    assert digest_of((tmp_path / LARGE).read_bytes()) == FILE_DIGESTS[LARGE]


def test_fetch_into_a_hub_cache(ready: ModelClient, tmp_path: Path) -> None:
    light = ready.fetch_to_hub_cache(REPOSITORY, tmp_path, ignore_weights=True)
    assert set(files_below(light)) == set(FILES) - WEIGHTS
    whole = ready.fetch_to_hub_cache(REPOSITORY, tmp_path)
    assert whole == light
    assert files_below(whole) == FILE_DIGESTS
    assert (tmp_path / "models--org--tiny-1.0" / "refs" / "main").read_text() == whole.name


def test_cut_stream_goes_on_where_it_was(ready: ModelClient, tmp_path: Path) -> None:
    with TcpProxy(ready.address) as proxy, ModelClient(proxy.address, patience_seconds=20, files_port=0) as client:
        proxy.cut_after(1_700_000)
        report = client.fetch(REPOSITORY, tmp_path / "to", streams=1, chunk_bytes=65536)
    assert report.breaks >= 1
    assert report.resent_bytes == 0
    assert report.bytes_received == sum(map(len, FILES.values()))
    assert files_below(tmp_path / "to") == FILE_DIGESTS


class GivenUpError(Exception):
    pass


def given_up_after(client: ModelClient, folder: Path, size_bytes: int) -> None:
    """A fetch that ends once so many bytes have come, as by Ctrl-C."""
    left = [size_bytes]

    def count(came: int) -> None:
        left[0] -= came
        if left[0] < 0:
            raise GivenUpError

    with pytest.raises(GivenUpError):
        client.fetch(REPOSITORY, folder, streams=1, chunk_bytes=65536, on_bytes=count)


def test_link_that_is_gone_for_good(ready: ModelClient, tmp_path: Path) -> None:
    with TcpProxy(ready.address) as proxy, ModelClient(proxy.address, patience_seconds=0, files_port=0) as client:
        proxy.cut_after(2_000_000, forever=True)
        with pytest.raises(ServerUnreachable):
            client.fetch(REPOSITORY, tmp_path / "to", streams=1, chunk_bytes=65536)
    assert not (tmp_path / "to" / LARGE).exists()


def test_fetch_that_was_given_up_on_is_resumed_by_the_next(ready: ModelClient, tmp_path: Path) -> None:
    given_up_after(ready, tmp_path / "to", MIB)
    assert not (tmp_path / "to" / LARGE).exists()
    report = ready.fetch(REPOSITORY, tmp_path / "to")
    assert report.bytes_resumed > MIB - 65536
    assert report.bytes_received + report.bytes_resumed == sum(map(len, FILES.values()))
    assert files_below(tmp_path / "to") == FILE_DIGESTS


def test_partial_file_with_wrong_bytes_is_noticed(ready: ModelClient, tmp_path: Path) -> None:
    given_up_after(ready, tmp_path / "to", MIB)
    partial = max((tmp_path / "to" / ".mx-partial").glob("*/*"), key=lambda path: path.stat().st_size)
    data = bytearray(partial.read_bytes())
    data[1000] ^= 1
    partial.write_bytes(data)
    report = ready.fetch(REPOSITORY, tmp_path / "to")
    assert report.bytes_received > len(FILES[LARGE])
    assert files_below(tmp_path / "to") == FILE_DIGESTS


def test_file_that_was_cut_on_the_server_is_not_sent(client: ModelClient, cache_folder: Path, tmp_path: Path) -> None:
    client.ensure(REPOSITORY)
    blob = (cache_folder / "models--org--tiny-1.0" / "snapshots").glob(f"*/{LARGE}")
    real = next(blob).resolve()
    real.write_bytes(FILES[LARGE][:-1])
    with pytest.raises(ServerRefused, match="DATA_LOSS"):
        client.fetch(REPOSITORY, tmp_path)
    assert not (tmp_path / LARGE).exists()


def test_link_that_leads_out_of_the_cache_is_not_followed(
    client: ModelClient, cache_folder: Path, tmp_path: Path
) -> None:
    client.ensure(REPOSITORY)
    real = next((cache_folder / "models--org--tiny-1.0" / "snapshots").glob("*/config.json")).resolve()
    secret = tmp_path / "secret"
    secret.write_bytes(b"x" * len(FILES["config.json"]))
    real.unlink()
    real.symlink_to(secret)
    with pytest.raises(ServerRefused, match="leads out"):
        client.fetch(REPOSITORY, tmp_path / "to", streams=1)


def test_model_that_is_not_cached(client: ModelClient, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="mx models get"):
        client.fetch(REPOSITORY, tmp_path)


def test_removing_what_is_not_there_is_success_to_existing_clients(
    stub: model_pb2_grpc.ModelServiceStub, ready: ModelClient
) -> None:
    """It is as they want it; ours is told so by a field of its own."""
    answer = stub.DeleteModel(model_pb2.DeleteModelRequest(model_name="org/absent"), timeout=60)
    assert (answer.success, answer.not_cached) == (True, True)
    with pytest.raises(ModelNotFound, match="org/absent is not cached"):
        ready.delete("org/absent")


class ForeignServer(model_pb2_grpc.ModelServiceServicer):
    """A server that knows the original fields alone, or sends what it should not."""

    def __init__(self, files: dict[str, bytes], *, sent_as: dict[str, str] | None = None) -> None:
        self.files = files
        self.sent_as = sent_as or {}
        self.asked: list[model_pb2.ModelFilesRequest] = []

    def ListModelFiles(  # noqa: N802
        self, request: model_pb2.ModelFilesRequest, context: grpc.ServicerContext
    ) -> model_pb2.ModelFileList:
        listed = [model_pb2.ModelFileInfo(relative_path=path, size=len(data)) for path, data in self.files.items()]
        return model_pb2.ModelFileList(model_name=request.model_name, files=listed)

    def StreamModelFiles(  # noqa: N802
        self, request: model_pb2.ModelFilesRequest, context: grpc.ServicerContext
    ) -> Iterator[model_pb2.FileChunk]:
        self.asked.append(request)
        for path in request.file_selector.paths:
            data = self.files[path]
            for offset in range(0, len(data), 1000) or [0]:
                yield model_pb2.FileChunk(
                    relative_path=self.sent_as.get(path, path),
                    data=data[offset : offset + 1000],
                    offset=offset,
                    total_size=len(data),
                    is_last_chunk=offset + 1000 >= len(data),
                )


@pytest.fixture
def foreign() -> Iterator[tuple[ForeignServer, ModelClient]]:
    service = ForeignServer({"a.json": b"a" * 2500, "sub/b.bin": b"", "c": b"c"})
    server = grpc.server(futures.ThreadPoolExecutor(4))
    model_pb2_grpc.add_ModelServiceServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with ModelClient(f"127.0.0.1:{port}", patience_seconds=0) as client:
        yield service, client
    server.stop(None).wait()


def test_server_without_our_additions(foreign: tuple[ForeignServer, ModelClient], tmp_path: Path) -> None:
    service, client = foreign
    report = client.fetch("org/x", tmp_path, revision="v1")
    assert files_below(tmp_path) == digests_of(service.files)
    assert (report.files, report.files_verified) == (3, 0)
    assert {asked.revision for asked in service.asked} == {"v1"}


@pytest.mark.parametrize("name", ["../evil", "/tmp/evil", "a/../../evil", "a\\evil", "C:evil", "a//b", "a\x00b", "con"])
def test_hostile_names_of_a_server_are_refused(
    foreign: tuple[ForeignServer, ModelClient], tmp_path: Path, name: str
) -> None:
    service, client = foreign
    service.files[name] = b"evil"
    with pytest.raises(FileRefused):
        client.fetch("org/x", tmp_path / "to")
    assert not (tmp_path / "to").exists()
    del service.files[name]
    service.sent_as["a.json"] = name
    with pytest.raises(FileRefused, match="not asked for"):
        client.fetch("org/x", tmp_path / "to")
    assert not (tmp_path / "evil").exists()


def test_link_in_the_target_folder_is_not_followed(foreign: tuple[ForeignServer, ModelClient], tmp_path: Path) -> None:
    _, client = foreign
    outside, to = tmp_path / "outside", tmp_path / "to"
    outside.mkdir()
    to.mkdir()
    (to / "sub").symlink_to(outside)
    with pytest.raises(OSError, match=r"Not a directory|Too many levels"):
        client.fetch("org/x", to)
    assert not list(outside.iterdir())


def test_many_streams_at_once(start_server: StartServer, tmp_path: Path) -> None:
    address = start_server().address
    with ModelClient(address) as client:
        client.ensure(REPOSITORY)

    def fetch(number: int) -> None:
        with ModelClient(address) as one:
            one.fetch(REPOSITORY, tmp_path / str(number), streams=3)

    threads = [threading.Thread(target=fetch, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(files_below(tmp_path / str(number)) == FILE_DIGESTS for number in range(6))

"""The cache's limits: what is evicted, what stays, and a disk that is really full."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from mxbench.stand_ins.hub import Fault, HubStandIn
from mxserver.wire import ModelDownloadError, ModelNotFound, ServerRefused
from mxserver.wire.calls import channel_options
from mxserver.wire.files import ModelClient
from mxserver.wire.proto import model_pb2, model_pb2_grpc
from tests.models.conftest import StartServer, digest_of, digests_of, files_below, pattern
from tests.small_disk import SmallDisk

MB = 1_000_000


@pytest.fixture
def models(hub: HubStandIn) -> list[str]:
    """Four models of 1 MB each."""
    names = [f"org/m{number}" for number in range(4)]
    for number, name in enumerate(names):
        hub.add(name, {"model.safetensors": pattern(MB, 20 + number)})
    return names


def cached(client: ModelClient) -> set[str]:
    return {model.model_name for model in client.cached_models().models}


@pytest.fixture
def small(start_server: StartServer) -> Iterator[ModelClient]:
    """Room for three of them."""
    with ModelClient(start_server(MX_CACHE_MAX_BYTES="3.5MB").address) as client:
        yield client


def test_least_recently_used_goes(small: ModelClient, models: list[str], tmp_path: Path) -> None:
    for name in models[:3]:
        small.ensure(name)
    small.fetch(models[0], tmp_path / "to")  # real use: it is the newest now
    small.ensure(models[3])
    assert cached(small) == {models[0], models[2], models[3]}
    assert small.cached_models().used_bytes == 3 * MB


def test_files_of_what_goes_are_gone(small: ModelClient, models: list[str], cache_folder: Path) -> None:
    for name in models:
        small.ensure(name)
    assert not (cache_folder / "models--org--m0").exists()
    assert (cache_folder / "models--org--m1").exists()


def test_pinned_models_stay(small: ModelClient, models: list[str]) -> None:
    small.ensure(models[0], pin=True)
    for name in models[1:3]:
        small.ensure(name)
    small.pin(models[1])
    small.ensure(models[3])
    assert cached(small) == {models[0], models[1], models[3]}
    small.pin(models[1], pinned=False)
    small.ensure(models[2])
    assert cached(small) == {models[0], models[3], models[2]}


def test_model_that_is_read_stays(start_server: StartServer, models: list[str], hub: HubStandIn) -> None:
    long = pattern(40 * MB, 30)  # more than buffers on the way take: the server is not done when the client waits
    hub.add("org/long", {"model.safetensors": long})
    address = start_server(MX_CACHE_MAX_BYTES="41.5MB").address
    options = [*channel_options(), ("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 65536)]
    with ModelClient(address) as client, grpc.insecure_channel(address, options=options) as channel:
        client.ensure("org/long")
        stub = model_pb2_grpc.ModelServiceStub(channel)
        stream = stub.StreamModelFiles(model_pb2.ModelFilesRequest(model_name="org/long"))
        got = bytearray(next(stream).data)
        for name in models[:3]:
            client.ensure(name)
        assert cached(client) == {"org/long", models[2]}
        with pytest.raises(ServerRefused, match="being read"):
            client.delete("org/long")
        for chunk in stream:
            got += chunk.data
        assert digest_of(got) == digest_of(long)


def test_model_that_does_not_fit_is_refused_before_it_is_fetched(
    small: ModelClient, models: list[str], hub: HubStandIn
) -> None:
    for name in models[:3]:
        small.ensure(name)
    hub.add("org/huge", {"model.safetensors": pattern(4 * MB, 40)})
    with pytest.raises(ModelDownloadError, match="MX_CACHE_FULL"):
        small.ensure("org/huge")
    assert hub.requests["GET model.safetensors"] == 3
    assert cached(small) == set(models[:3])


def test_download_in_flight_counts(small: ModelClient, models: list[str], hub: HubStandIn) -> None:
    small.ensure(models[0])
    gate = threading.Event()
    hub.add("org/big", {"big.safetensors": pattern(2 * MB, 41)})
    hub.faults["GET big.safetensors"].append(Fault(gate=gate, gate_after=500_000))
    download = threading.Thread(target=small.ensure, args=("org/big",))
    download.start()
    hub.wait_at_gate()
    small.ensure(models[1])
    assert cached(small) == {models[1]}
    gate.set()
    download.join()
    assert cached(small) == {models[1], "org/big"}


def test_revisions_share_bytes(small: ModelClient, hub: HubStandIn) -> None:
    weights = pattern(2 * MB, 50)
    old = hub.add("org/two", {"model.safetensors": weights, "config.json": b"{}"})
    small.ensure("org/two")
    new = hub.add("org/two", {"model.safetensors": weights, "config.json": b"{1}"})
    small.ensure("org/two")
    assert small.cached_models().used_bytes == 2 * MB + 2 + 3
    small.delete("org/two", revision=old)
    assert [model.revision for model in small.cached_models().models] == [new]
    assert not [verdict for verdict in small.validate("org/two") if verdict.problem]


def test_delete(small: ModelClient, models: list[str], cache_folder: Path) -> None:
    small.ensure(models[0], pin=True)
    with pytest.raises(ServerRefused, match="pinned"):
        small.delete(models[0])
    assert "removed" in small.delete(models[0], force=True)
    assert not cached(small)
    assert not list(cache_folder.glob("models--*"))
    with pytest.raises(ModelNotFound, match="not cached"):
        small.delete(models[0])


def test_delete_of_what_is_downloaded_is_refused(small: ModelClient, models: list[str], hub: HubStandIn) -> None:
    small.ensure(models[0])
    hub.add(models[0], {"more.safetensors": pattern(MB, 60)})
    gate = threading.Event()
    hub.faults["GET more.safetensors"].append(Fault(gate=gate, gate_after=100_000))
    download = threading.Thread(target=small.ensure, args=(models[0],))
    download.start()
    hub.wait_at_gate()
    small.delete(models[0])  # the old revision
    gate.set()
    download.join()
    assert [info.path for info in small.list_files(models[0]).files] == ["more.safetensors"]


def test_full_disk_evicts_first(start_server: StartServer, small_disk: SmallDisk, hub: HubStandIn) -> None:
    for number in range(3):
        hub.add(f"org/d{number}", {"model.safetensors": pattern(3 * MB, 70 + number)})
    with ModelClient(start_server(MODEL_EXPRESS_CACHE_DIRECTORY=str(small_disk.folder)).address) as client:
        for number in range(3):
            client.ensure(f"org/d{number}")
        assert cached(client) == {"org/d1", "org/d2"}


def test_disk_that_others_filled(start_server: StartServer, small_disk: SmallDisk, hub: HubStandIn) -> None:
    """The disk fills up while a download runs: an error that says so, and nothing of it stays."""
    gate = threading.Event()
    hub.add("org/d", {"model.safetensors": pattern(5 * MB, 80), "config.json": b"{}"})
    # The library writes in steps of 10 MiB: hold the answer back until the disk is full.
    hub.faults["GET model.safetensors"].append(Fault(gate=gate))
    with ModelClient(start_server(MODEL_EXPRESS_CACHE_DIRECTORY=str(small_disk.folder)).address) as client:
        failed: list[ModelDownloadError] = []

        def download() -> None:
            with pytest.raises(ModelDownloadError) as caught:
                client.ensure("org/d")
            failed.append(caught.value)

        thread = threading.Thread(target=download)
        thread.start()
        hub.wait_at_gate()
        small_disk.fill(MB)
        gate.set()
        thread.join()
        assert "MX_CACHE_FULL" in str(failed[0])
        assert not cached(client)
        assert not list((small_disk.folder / ".modelexpress" / "staging").iterdir())
        (small_disk.folder / "foreign").unlink()
        client.ensure("org/d")
        assert cached(client) == {"org/d"}


def test_what_is_there_can_be_read_and_removed_on_a_full_disk(
    start_server: StartServer, small_disk: SmallDisk, hub: HubStandIn, tmp_path: Path
) -> None:
    """Not one byte is left for a lease or a mark; removing a model is what makes room."""
    for number in range(2):
        hub.add(f"org/d{number}", {"model.safetensors": pattern(MB, 70 + number)})
    server = start_server(MODEL_EXPRESS_CACHE_DIRECTORY=str(small_disk.folder))
    with ModelClient(server.address) as client:
        client.ensure("org/d0")
        client.pin("org/d0")
        small_disk.fill(0)
        assert small_disk.free_bytes == 0
        client.ensure("org/d0")
        client.fetch("org/d0", tmp_path / "fetched")
        assert files_below(tmp_path / "fetched") == digests_of({"model.safetensors": pattern(MB, 70)})
        with pytest.raises(ModelDownloadError, match="MX_CACHE_FULL"):
            client.ensure("org/d1")
        client.delete("org/d0", force=True)
        assert cached(client) == set()
        assert small_disk.free_bytes > 0.9 * MB
        (small_disk.folder / "foreign").unlink()
        client.ensure("org/d1")
        assert cached(client) == {"org/d1"}
    assert not [line for line in server.lines if "Traceback" in line]


def test_a_disk_that_became_read_only(
    start_server: StartServer, small_disk: SmallDisk, hub: HubStandIn, tmp_path: Path
) -> None:
    """As Linux does with a disk that fails: what is there can be had, all else is refused with the reason."""
    for number in range(2):
        hub.add(f"org/r{number}", {"model.safetensors": pattern(MB, 70 + number)})
    server = start_server(MODEL_EXPRESS_CACHE_DIRECTORY=str(small_disk.folder))
    with ModelClient(server.address) as client:
        client.ensure("org/r0")
        small_disk.read_only(True)
        client.ensure("org/r0")
        client.fetch("org/r0", tmp_path / "fetched")
        assert files_below(tmp_path / "fetched") == digests_of({"model.safetensors": pattern(MB, 70)})
        assert [verdict.problem for verdict in client.validate("org/r0")] == [""]
        with pytest.raises(ModelDownloadError, match=r"Read-only file system.*MX_CACHE_UNUSABLE"):
            client.ensure("org/r1")
        for refused in (client.pin, client.delete):
            with pytest.raises(ServerRefused, match="Read-only file system"):
                refused("org/r0")
        small_disk.read_only(False)
        client.ensure("org/r1")
        client.delete("org/r0")
    assert not [line for line in server.lines if "Traceback" in line]


def test_a_server_over_a_read_only_cache_serves_what_is_there(
    start_server: StartServer, small_disk: SmallDisk, hub: HubStandIn, tmp_path: Path
) -> None:
    """As an image or a volume that is mounted read-only, filled by another server (findings, row 16)."""
    for number in range(2):
        hub.add(f"org/r{number}", {"model.safetensors": pattern(MB, 70 + number)})
    before = start_server(MODEL_EXPRESS_CACHE_DIRECTORY=str(small_disk.folder))
    with ModelClient(before.address) as client:
        client.ensure("org/r0")
    before.close()
    small_disk.read_only(True)
    server = start_server(MODEL_EXPRESS_CACHE_DIRECTORY=str(small_disk.folder))
    with ModelClient(server.address) as client:
        client.ensure("org/r0")
        client.fetch("org/r0", tmp_path / "fetched")
        assert files_below(tmp_path / "fetched") == digests_of({"model.safetensors": pattern(MB, 70)})
        with pytest.raises(ModelDownloadError, match=r"Read-only file system.*MX_CACHE_UNUSABLE"):
            client.ensure("org/r1")
    server.wait_for("the cache folder is read-only: what it has is served")
    server.signal(signal.SIGTERM)
    assert server.wait() == 0
    assert not [line for line in server.lines if "Traceback" in line]


def test_free_space_limit(start_server: StartServer, small_disk: SmallDisk, hub: HubStandIn) -> None:
    for number in range(2):
        hub.add(f"org/f{number}", {"model.safetensors": pattern(2 * MB, 90 + number)})
    server = start_server(MODEL_EXPRESS_CACHE_DIRECTORY=str(small_disk.folder), MX_CACHE_MIN_FREE_BYTES="5MB")
    with ModelClient(server.address) as client:
        for number in range(2):
            client.ensure(f"org/f{number}")
        assert cached(client) == {"org/f1"}
        hub.add("org/f2", {"model.safetensors": pattern(4 * MB, 99)})
        with pytest.raises(ModelDownloadError, match="MX_CACHE_MIN_FREE_BYTES=5000000"):
            client.ensure("org/f2")


def test_limit_that_others_break_is_held_by_itself(
    start_server: StartServer, small_disk: SmallDisk, hub: HubStandIn
) -> None:
    """The keeper evicts when something else fills the disk, without anybody asking for a model."""
    hub.add("org/k", {"model.safetensors": pattern(2 * MB, 100)})
    server = start_server(MODEL_EXPRESS_CACHE_DIRECTORY=str(small_disk.folder), MX_CACHE_MIN_FREE_BYTES="5MB")
    with ModelClient(server.address) as client:
        client.ensure("org/k")
        (small_disk.folder / "foreign").write_bytes(b"x" * 2 * MB)
        server.wait_for("removed model=org/k")
        assert not cached(client)

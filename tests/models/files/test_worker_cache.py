"""What a worker does with the server's cache: streams into memory, files in the hub's layout, a folder both see."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mxbench.stand_ins.hub import HubStandIn
from mxbench.stand_ins.tcp_proxy import TcpProxy
from mxcore.errors import StorageError
from mxcore.storage.checkpoint import checkpoint_digest
from mxcore.storage.remote import (
    RemoteRange,
    ServerFolder,
    has_weights,
    open_remote,
    remote_digest,
    same_files_here,
    stream_remote,
)
from mxserver.wire.files import ModelClient, ModelFiles
from tests.models.conftest import StartServer
from tests.object_store.conftest import make_checkpoint

MODEL = "org/real"


@pytest.fixture
def real(hub: HubStandIn, tmp_path: Path) -> tuple[Path, dict[str, np.ndarray]]:
    """A checkpoint on the hub, and the same files here."""
    tensors = make_checkpoint(tmp_path / "real")
    files = {
        path.relative_to(tmp_path / "real").as_posix(): path.read_bytes()
        for path in (tmp_path / "real").rglob("*")
        if path.is_file()
    }
    hub.add(MODEL, files)
    return tmp_path / "real", tensors


def listed(client: ModelClient) -> ModelFiles:
    client.ensure(MODEL)
    return client.list_files(MODEL)


def test_tensors_and_digest_come_over_streams(client: ModelClient, real: tuple[Path, dict[str, np.ndarray]]) -> None:
    folder = ServerFolder(client, MODEL, listed(client))
    try:
        checkpoint = open_remote(folder)
        found = {name: tensor.numpy().copy() for name, tensor in stream_remote(folder, checkpoint, batch_bytes=1 << 20)}
        assert found.keys() == real[1].keys()
        assert all(np.array_equal(found[name], real[1][name]) for name in found)
        assert folder.bytes_received <= 1.05 * checkpoint.total_bytes
        assert remote_digest(folder) == checkpoint_digest(
            sorted(real[0].glob("*.safetensors")), real[0] / "model.safetensors.index.json"
        )
        assert folder.whole("config.json") == (real[0] / "config.json").read_bytes()
        with pytest.raises(StorageError, match="there is no none"):
            folder.whole("none")
    finally:
        folder.close()


def files_address(address: str) -> str:
    """Where a server has the bytes of its files."""
    with ModelClient(address) as client:
        place = listed(client).place
    assert place
    return f"127.0.0.1:{place.port}"


def test_a_cut_in_the_middle_sends_nothing_twice(
    start_server: StartServer, real: tuple[Path, dict[str, np.ndarray]]
) -> None:
    server = start_server()
    with (
        TcpProxy(files_address(server.address)) as proxy,
        ModelClient(server.address, patience_seconds=60, files_port=proxy.port) as client,
    ):
        folder = ServerFolder(client, MODEL, listed(client))
        try:
            checkpoint = open_remote(folder)
            proxy.cut_after(checkpoint.total_bytes // 2)
            found = {name: tensor.numpy().copy() for name, tensor in stream_remote(folder, checkpoint)}
        finally:
            folder.close()
        assert proxy.cuts == 1
    assert all(np.array_equal(found[name], real[1][name]) for name in real[1])


def test_what_the_server_does_not_have_is_an_error(
    client: ModelClient, real: tuple[Path, dict[str, np.ndarray]]
) -> None:
    folder = ServerFolder(client, MODEL, listed(client))
    room = np.zeros(64, dtype=np.uint8)
    try:
        with pytest.raises(Exception, match=r"MX_"):
            folder.read_into([RemoteRange("none.safetensors", 0, 64, room.ctypes.data)])
    finally:
        folder.close()


def test_small_files_first_and_weights_later_in_the_same_snapshot(
    client: ModelClient, real: tuple[Path, dict[str, np.ndarray]], tmp_path: Path
) -> None:
    cache = tmp_path / "hub-cache"
    client.ensure(MODEL, ignore_weights=True)
    first = client.fetch_to_hub_cache(MODEL, cache, ignore_weights=True)
    assert not has_weights(client.list_files(MODEL, ignore_weights=True))
    assert (first / "config.json").is_file()
    assert not list(first.glob("*.safetensors"))
    client.ensure(MODEL)
    assert client.fetch_to_hub_cache(MODEL, cache) == first
    assert len(list(first.glob("*.safetensors"))) == 2
    assert has_weights(client.list_files(MODEL))


FETCH = """
import sys
from pathlib import Path
from mxserver.wire.files.model_client import ModelClient
with ModelClient(sys.argv[1], files_port=int(sys.argv[4])) as client:
    got = []
    client.fetch_to_hub_cache(sys.argv[2], Path(sys.argv[3]), on_bytes=got.append)
"""


def test_ranks_share_one_download_and_a_killed_one_leaves_its_lock(
    start_server: StartServer, real: tuple[Path, dict[str, np.ndarray]], tmp_path: Path
) -> None:
    """Three processes at once, one of them killed in the middle: the bytes cross the wire about once."""
    server = start_server()
    with ModelClient(server.address) as client:
        size = listed(client).size_bytes
    with TcpProxy(files_address(server.address)) as proxy:
        to = str(tmp_path / "hub-cache")
        command = [sys.executable, "-c", FETCH, server.address, MODEL, to, str(proxy.port)]
        proxy.bytes_per_second = 4e6  # slower than the disk: what was sent is there, and not in the sockets' buffers
        proxy.cut_after(size // 2, meanwhile=lambda: first.kill())
        first = subprocess.Popen(command)
        first.wait(120)
        others = [subprocess.Popen(command) for _ in range(2)]
        assert [other.wait(120) for other in others] == [0, 0]
        sent = proxy.answered_bytes
    assert first.returncode != 0
    (snapshot,) = (tmp_path / "hub-cache" / "models--org--real" / "snapshots").iterdir()
    for path in real[0].rglob("*"):
        if path.is_file():
            assert (snapshot / path.relative_to(real[0])).read_bytes() == path.read_bytes()
    assert sent < 1.6 * size, "what had come of the killed one is not fetched again, nor what the other brought"


def test_the_servers_folder_is_used_only_when_it_is_the_same(
    client: ModelClient, real: tuple[Path, dict[str, np.ndarray]], tmp_path: Path
) -> None:
    told = listed(client)
    folder, reason = same_files_here(told)
    assert folder is not None
    assert folder == told.folder
    assert "of the same digests" in reason

    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    assert same_files_here(told._replace(folder=copy))[0] == copy
    index = copy / "model.safetensors.index.json"
    index.write_bytes(index.read_bytes().replace(b"layers.0.bias", b"layers.9.bias"))
    assert same_files_here(told._replace(folder=copy)) == (
        None,
        f"{copy} has other files here: model.safetensors.index.json has another digest",
    )
    with next(iter(sorted(copy.glob("*.safetensors")))).open("r+b") as file:
        file.truncate(1000)
    assert "1000 bytes, not" in same_files_here(told._replace(folder=copy))[1]
    assert "No such file" in same_files_here(told._replace(folder=tmp_path / "none"))[1]
    assert same_files_here(told._replace(folder=None))[0] is None
    undigested = tuple(info._replace(digest="") for info in told.files)
    assert "no digests" in same_files_here(told._replace(files=undigested))[1]

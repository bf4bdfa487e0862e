"""A hub, a cache folder, and servers over it: as processes of their own, since the hub's library reads its
environment once."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from mxbench.stand_ins.hub import HubStandIn, hub_stand_in
from mxserver.wire.files import ModelClient
from tests.server.conftest import ServerProcess
from tests.small_disk import SmallDisk

CONFIG = b'{"model_type": "tiny"}'


def pattern(size: int, seed: int = 1) -> bytes:
    """Bytes that are different everywhere, so that a wrong offset shows."""
    block = bytes((index * 167 + index // 251 + seed) & 0xFF for index in range(4096))
    return b"".join(
        number.to_bytes(8, "little") + block[8:] for number in range(seed << 32, (seed << 32) + size // 4096 + 1)
    )[:size]


FILES = {
    "config.json": CONFIG,
    "README.md": b"",
    "model-00001-of-00002.safetensors": pattern(3_000_001, 1),
    "model-00002-of-00002.safetensors": pattern(1_500_000, 2),
    "extra/nested/tokenizer.json": pattern(20_000, 3),
}
WEIGHTS = {path for path in FILES if path.endswith(".safetensors")}
REPOSITORY = "org/tiny-1.0"


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting of whoever runs the tests counts."""
    for name in list(os.environ):
        if name.startswith(("MX_", "MODEL_EXPRESS_", "HF_", "HUGGING_FACE_", "AWS_", "GOOGLE_", "AZURE_")):
            monkeypatch.delenv(name)


@pytest.fixture
def hub() -> Iterator[HubStandIn]:
    with hub_stand_in() as running:
        running.add(REPOSITORY, FILES)
        yield running


@pytest.fixture
def cache_folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[SmallDisk]:
    """A file system of 8 MiB."""
    with SmallDisk(tmp_path / "disk") as disk:
        yield disk


StartServer = Callable[..., ServerProcess]


@pytest.fixture
def start_server(tmp_path: Path, hub: HubStandIn, cache_folder: Path) -> Iterator[StartServer]:
    """Starts servers over the cache folder, with the hub stand-in as their hub, and ends them after the test."""
    started: list[ServerProcess] = []

    def start(*arguments: str, launcher: Sequence[str] = (), **environ: str) -> ServerProcess:
        defaults = {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "hf-home"),
            "HF_HUB_DOWNLOAD_TIMEOUT": "120",  # of a hub that tests hold back for as long as they like
            "MODEL_EXPRESS_CACHE_DIRECTORY": str(cache_folder),
            "MX_METADATA_BACKEND": "memory",
            "MX_CACHE_LEASE_SECS": "2",
        }
        started.append(ServerProcess("--port", "0", *arguments, environ=defaults | environ, launcher=launcher))
        return started[-1]

    yield start
    for process in started:
        process.close()


@pytest.fixture
def client(start_server: StartServer) -> Iterator[ModelClient]:
    with ModelClient(start_server().address, patience_seconds=20) as opened:
        yield opened


class FileDigest(NamedTuple):
    """What tests compare instead of a file's bytes: a comparison of those that fails would print all of them."""

    size_bytes: int
    sha256: str


def digest_of(data: bytes | bytearray) -> FileDigest:
    return FileDigest(len(data), hashlib.sha256(data).hexdigest())


def digests_of(files: Mapping[str, bytes]) -> dict[str, FileDigest]:
    return {path: digest_of(data) for path, data in files.items()}


def files_below(folder: Path) -> dict[str, FileDigest]:
    """Every file below a folder, links followed, without what is not whole yet."""
    return {
        str(path.relative_to(folder)): digest_of(path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file() and ".mx-partial" not in path.parts
    }


FILE_DIGESTS = digests_of(FILES)


@pytest.fixture(scope="module")
def warm_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of one server for all tests that only read, with the model in its cache."""
    scratch = tmp_path_factory.mktemp("warm")
    with hub_stand_in() as hub:
        hub.add(REPOSITORY, FILES)
        environ = {"HF_ENDPOINT": hub.url, "HF_HOME": str(scratch / "hf"), "MX_METADATA_BACKEND": "memory"}
        process = ServerProcess("--port", "0", "--cache-dir", str(scratch / "cache"), environ=environ)
        with ModelClient(process.address) as client:
            client.ensure(REPOSITORY)
        yield process.address
        process.close()

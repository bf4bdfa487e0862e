"""A range of a cached file by HTTP into memory, every digest checked, against a bare server with sendfile."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.micro.conftest import Measure
from mxbench.files.bare import bare_http, take_http
from mxbench.files.server import running_server
from mxserver.wire.files import ModelClient

SIZE_BYTES = 64 * 1024 * 1024

pytestmark = pytest.mark.benchmark(group="range of 64 MiB to memory")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sources") / "model" / "model.safetensors"
    path.parent.mkdir()
    path.write_bytes(os.urandom(SIZE_BYTES))
    return path


@pytest.fixture(scope="module")
def client(file: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModelClient]:
    with (
        running_server(tmp_path_factory.mktemp("cache"), file.parent.parent) as (port, _),
        ModelClient(f"127.0.0.1:{port}") as opened,
    ):
        opened.ensure(f"file://{file.parent}")
        yield opened


def test_range(measure: Measure, client: ModelClient, file: Path) -> None:
    name = f"file://{file.parent}"
    listed = client.list_files(name)
    into = memoryview(bytearray(SIZE_BYTES))
    with client.reader(name, revision=listed.revision, place=listed.place) as reader:
        measure(lambda: reader.read_into(file.name, 0, into), total_bytes=SIZE_BYTES)
        assert not reader.bytes_unverified
    assert into == file.read_bytes()


def test_limit_sendfile(measure: Measure, file: Path) -> None:
    into = memoryview(bytearray(SIZE_BYTES))
    with bare_http() as (port, _):
        measure(lambda: take_http(port, [file], into), total_bytes=SIZE_BYTES)

"""A bucket with a small checkpoint on a real S3 server, and the environment that reaches it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from mxbench.stand_ins.s3_server import S3Server, environment
from mxbench.stand_ins.tcp_proxy import TcpProxy

PREFIX = "team/tiny"
URI = f"s3://models/{PREFIX}"
SMALL = {"config.json": b'{"model_type": "tiny"}', "tokenizer.json": b"{}", "nested/merges.txt": b"a b\n"}


def make_checkpoint(folder: Path, *, rows: int = 700) -> dict[str, np.ndarray]:
    """Two shards with an index, some MB, and small files beside them; returns the tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(7)
    tensors = {f"layers.{n}.weight": random.standard_normal((rows, 1024), dtype=np.float32) for n in range(4)}
    tensors |= {f"layers.{n}.bias": random.standard_normal(17, dtype=np.float32) for n in range(4)}
    shards = {"model-00001-of-00002.safetensors": (0, 1), "model-00002-of-00002.safetensors": (2, 3)}
    weight_map: dict[str, str] = {}
    for file, layers in shards.items():
        part = {name: tensor for name, tensor in tensors.items() if int(name.split(".")[1]) in layers}
        save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for name, data in SMALL.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
    return tensors


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    """The bucket `models` as a folder, and the checkpoint's tensors. Nobody changes it."""
    root = tmp_path_factory.mktemp("s3")
    return root, make_checkpoint(root / "models" / PREFIX)


@pytest.fixture(scope="session")
def server(made: tuple[Path, dict[str, np.ndarray]]) -> Iterator[S3Server]:
    with S3Server(made[0]) as running:
        yield running


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting of whoever runs the tests counts."""
    for name in list(os.environ):
        if name.startswith(("MX_", "MODEL_EXPRESS_", "AWS_", "GOOGLE_", "AZURE_", "RUNAI_", "HF_")):
            monkeypatch.delenv(name)


@pytest.fixture
def s3(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """The server, with the environment that reaches it."""
    use(monkeypatch, server.address)
    return server


@pytest.fixture
def proxy(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[TcpProxy]:
    """A proxy before the server, with the environment that reaches it."""
    with TcpProxy(server.address) as running:
        use(monkeypatch, running.address)
        yield running


def use(monkeypatch: pytest.MonkeyPatch, address: str, **more: str) -> None:
    for name, value in (environment(address) | more).items():
        monkeypatch.setenv(name, value)

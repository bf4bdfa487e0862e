"""Real vLLM engines: a source and a target process, a real server, models with their reference answers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mxbench.demo import models
from mxbench.demo.workers import Server
from tests.vllm.engines import EngineHost

LLAMA = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything here starts engines."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.vllm)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("vllm")


@pytest.fixture(scope="session")
def server(folder: Path) -> Iterator[str]:
    process = Server(folder)
    try:
        yield process.start()
    finally:
        process.child.stop()


@pytest.fixture(scope="session")
def page(folder: Path, server: str) -> str:
    """The server's status page: http://host:port."""
    found = re.search(r"status page on (http://\S+)", (folder / "logs" / "mxserver.log").read_text())
    assert found is not None
    return found[1]


@pytest.fixture(scope="session")
def model_paths(folder: Path) -> dict[str, Path]:
    return {
        "llama": models.generate(folder / "models" / "llama", "llama", LLAMA),
        "qwen3": models.qwen3(folder / "models" / "qwen3"),
        "minilm": models.minilm(folder / "models" / "minilm"),
    }


@pytest.fixture(scope="session")
def _source_host(folder: Path, server: str) -> Iterator[EngineHost]:
    host = EngineHost("source", folder, server)
    yield host
    host.close()


@pytest.fixture(scope="session")
def _target_host(folder: Path, server: str) -> Iterator[EngineHost]:
    host = EngineHost("target", folder, server)
    yield host
    host.close()


@pytest.fixture
def source(_source_host: EngineHost) -> Iterator[EngineHost]:
    """The process of workers that load first; what they serve ends with the test."""
    yield _source_host
    _source_host.ask("leave")


@pytest.fixture
def target(_target_host: EngineHost, _source_host: EngineHost) -> Iterator[EngineHost]:
    """The process of workers that load second. The source's process starts beside it."""
    yield _target_host
    _target_host.ask("leave")


@pytest.fixture
def unpacked(source: EngineHost, target: EngineHost) -> Iterator[None]:
    """Linear layers are not packed away, so that processed weights can move on a CPU."""
    for host in (source, target):
        host.ask("plain_linear", on=True)
    yield
    for host in (source, target):
        host.ask("plain_linear", on=False)


class References:
    """Answers of vLLM's default loader, each made once."""

    def __init__(self, host: EngineHost) -> None:
        self._host = host
        self._known: dict[str, list[Any]] = {}

    def of(self, model: Path, **options: Any) -> list[Any]:
        key = f"{model} {options}"
        if key not in self._known:
            self._known[key] = self._host.load(model, "auto", **options).answers
        return self._known[key]


@pytest.fixture(scope="session")
def references(_source_host: EngineHost) -> References:
    return References(_source_host)

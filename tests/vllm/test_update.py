"""A running engine takes other weights: all of them or none, and then it is as vLLM's default loader makes it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from mxbench.demo import models
from mxbench.demo.models import weight_files
from mxbench.demo.processes import files_away
from mxserver.wire.calls import ServerClient
from mxserver.wire.proto import p2p_pb2
from tests.vllm.conftest import LLAMA
from tests.vllm.engines import EngineHost
from tests.vllm.updated import TRANSFER, as_loaded, now, update


@pytest.fixture(scope="module")
def versions(folder: Path) -> tuple[Path, Path]:
    """One model with two seeds: no tensor is equal."""
    place = folder / "versions"
    return models.generate(place / "1", "llama", LLAMA, seed=1), models.generate(place / "2", "llama", LLAMA, seed=2)


@pytest.fixture
def client(server: str) -> Iterator[ServerClient]:
    with ServerClient(server) as connected:
        yield connected


def test_from_storage_and_from_a_worker_there_and_back(
    source: EngineHost, target: EngineHost, versions: tuple[Path, Path], client: ServerClient
) -> None:
    one, two = versions
    expected = {model: as_loaded(source, model) for model in versions}
    first = source.load(one, keep=True, **TRANSFER).report
    target.load(one, keep=True, **TRANSFER)
    try:
        for model in (two, one):
            state = update(source, path=str(model))
            assert now(source) == expected[model]
            assert state["version"] == str(model)
            with files_away(weight_files(model)):
                update(target, path=str(model), checkpoint=state["checkpoint"])
            assert now(target) == expected[model]
            record = client.get_metadata(first["source_id"], first["worker_id"])
            assert record is not None
            assert record.worker.status == p2p_pb2.SOURCE_STATUS_STALE
    finally:
        source.ask("end")
        target.ask("end")
    assert expected[one] != expected[two]

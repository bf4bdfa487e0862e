"""A running engine takes other weights: all of them or none, and then it is as vLLM's default loader makes it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.demo import models
from bench.demo.models import weight_files
from bench.demo.processes import files_away
from mxserver.wire.calls import ServerClient
from mxserver.wire.proto import p2p_pb2
from tests.vllm.conftest import LLAMA
from tests.vllm.engines import EngineHost

TRANSFER: dict[str, Any] = {"weight_transfer_config": {"backend": "mx"}}


@pytest.fixture(scope="module")
def versions(folder: Path) -> tuple[Path, Path]:
    """One model with two seeds: no tensor is equal."""
    place = folder / "versions"
    return models.generate(place / "1", "llama", LLAMA, seed=1), models.generate(place / "2", "llama", LLAMA, seed=2)


@pytest.fixture
def client(server: str) -> Iterator[ServerClient]:
    with ServerClient(server) as connected:
        yield connected


def now(host: EngineHost) -> dict[str, Any]:
    """What the kept engine answers, and its tensors' digests."""
    told = host.ask("answers")
    return {"answers": told["answers"], "digests": told["digests"]}


def as_loaded(host: EngineHost, model: Path, **options: Any) -> dict[str, Any]:
    """The same of an engine that vLLM's default loader loads."""
    host.load(model, "auto", keep=True, **options)
    told = now(host)
    host.ask("end")
    return told


def update(host: EngineHost, **info: Any) -> dict[str, Any]:
    """Without an error; the state of the first worker's model."""
    told = host.ask("update", info=info)
    assert told["error"] == ""
    state: dict[str, Any] = told["states"][0]["models"][0]
    assert state["ready"]
    return state


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

"""An engine that sleeps, reloads or ends: what it served meanwhile, and after it.

vLLM's CPU worker takes the calls and leaves its weights where they are; a worker class of the tests overwrites them, as
a sleep on an accelerator takes their memory away.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mxbench.demo.models import weight_files
from mxbench.demo.processes import files_away
from mxserver.wire.calls import ServerClient
from mxserver.wire.proto import p2p_pb2
from tests.vllm.conftest import References
from tests.vllm.engines import EngineHost


@pytest.fixture
def client(server: str) -> Iterator[ServerClient]:
    with ServerClient(server) as connected:
        yield connected


def status(client: ServerClient, report: dict[str, Any]) -> p2p_pb2.SourceStatus.ValueType:
    record = client.get_metadata(report["source_id"], report["worker_id"])
    assert record is not None
    return record.worker.status


@pytest.fixture
def awake(source: EngineHost, model_paths: dict[str, Path]) -> Iterator[dict[str, Any]]:
    """The report of an engine in the source's process that stays."""
    loaded = source.load(model_paths["llama"], keep=True)
    yield loaded.report
    source.ask("end")


def test_asleep_it_serves_nothing_and_awake_it_serves_again(
    awake: dict[str, Any],
    client: ServerClient,
    source: EngineHost,
    target: EngineHost,
    references: References,
    model_paths: dict[str, Path],
) -> None:
    model = model_paths["llama"]
    assert status(client, awake) == p2p_pb2.SOURCE_STATUS_READY

    source.ask("sleep", level=1)
    assert status(client, awake) == p2p_pb2.SOURCE_STATUS_INITIALIZING
    source.ask("wake_up", tags=["kv_cache"])
    assert status(client, awake) == p2p_pb2.SOURCE_STATUS_INITIALIZING
    source.ask("wake_up", tags=["weights"])
    assert status(client, awake) == p2p_pb2.SOURCE_STATUS_READY

    with files_away(weight_files(model)):
        loaded = target.load(model)
    assert loaded.answers == references.of(model)
    assert loaded.report["source_worker"] == awake["worker_id"]


def test_memory_that_is_gone_is_never_served(
    client: ServerClient, source: EngineHost, target: EngineHost, unpacked: None, model_paths: dict[str, Path]
) -> None:
    """Asleep the source's memory holds no weights: who asks then takes storage, who asks after it gets the weights."""
    model, processed = model_paths["llama"], {"layout": "processed"}
    expected = source.load(model, "auto").answers
    first = source.load(model, extra=processed, keep=True, worker_cls="tests.vllm.sleeping_worker.SleepingWorker")
    try:
        source.ask("sleep", level=1)
        meanwhile = target.load(model, extra=processed)
        target.ask("leave")
        source.ask("wake_up", tags=["kv_cache"])
        assert status(client, first.report) == p2p_pb2.SOURCE_STATUS_INITIALIZING
        source.ask("wake_up", tags=["weights"])
        with files_away(weight_files(model)):
            after = target.load(model, extra=processed)
        source.ask("sleep", level=2)
        assert status(client, first.report) == p2p_pb2.SOURCE_STATUS_STALE
        source.ask("wake_up", tags=None)
        assert status(client, first.report) == p2p_pb2.SOURCE_STATUS_STALE
    finally:
        source.ask("end")

    assert first.answers == meanwhile.answers == after.answers == expected
    assert [loaded.report["path"] for loaded in (meanwhile, after)] == ["storage", "p2p"]
    assert after.report["source_worker"] == first.report["worker_id"]


def test_an_engine_that_ends_leaves_the_offers_of_another_alone(
    client: ServerClient, source: EngineHost, model_paths: dict[str, Path]
) -> None:
    """Two engines of one process; what the first one offers, this process' `load` keeps."""
    first = source.load(model_paths["qwen3"]).report
    second = source.load(model_paths["llama"], keep=True).report
    source.ask("sleep", level=1)
    assert status(client, second) == p2p_pb2.SOURCE_STATUS_INITIALIZING
    assert status(client, first) == p2p_pb2.SOURCE_STATUS_READY
    source.ask("end")
    assert status(client, second) == p2p_pb2.SOURCE_STATUS_STALE
    assert status(client, first) == p2p_pb2.SOURCE_STATUS_READY


def test_weights_that_changed_during_sleep_are_not_served_again(
    awake: dict[str, Any], client: ServerClient, source: EngineHost
) -> None:
    source.ask("sleep", level=1)
    assert source.ask("corrupt", name="down_proj.weight")["flipped"] > 0
    source.ask("wake_up", tags=None)

    assert status(client, awake) == p2p_pb2.SOURCE_STATUS_STALE
    assert source.ask("leave")["left"] == 0


def test_a_deep_sleep_ends_the_offer_and_waking_up_begins_another(
    awake: dict[str, Any], client: ServerClient, source: EngineHost
) -> None:
    source.ask("sleep", level=2)
    assert status(client, awake) == p2p_pb2.SOURCE_STATUS_STALE
    assert source.ask("leave")["left"] == 0
    source.ask("wake_up", tags=None)
    assert status(client, awake) == p2p_pb2.SOURCE_STATUS_STALE
    assert source.ask("leave")["left"] == 1


def test_after_a_deep_sleep_weights_come_from_a_worker_that_has_them(
    source: EngineHost, target: EngineHost, references: References, model_paths: dict[str, Path]
) -> None:
    """Its memory was overwritten meanwhile, as an accelerator's is given to others."""
    model = model_paths["qwen3"]
    source.load(model, keep=True)
    slept = target.load(model, keep=True, worker_cls="tests.vllm.sleeping_worker.SleepingWorker")
    try:
        target.ask("sleep", level=2)
        target.ask("wake_up", tags=["kv_cache"])
        with files_away(weight_files(model)):
            target.ask("wake_up", tags=["weights"])
        after = target.ask("answers")["answers"]
    finally:
        source.ask("end")
        target.ask("end")
    report = json.loads(Path(f"{slept.report_path}.update").read_text())
    assert (report["path"], report["serving"]) == ("p2p", True)
    assert after == slept.answers == references.of(model)


def test_an_engine_that_gets_no_weights_again_does_not_wake_up(
    source: EngineHost, references: References, model_paths: dict[str, Path]
) -> None:
    model = model_paths["qwen3"]
    slept = source.load(model, keep=True, worker_cls="tests.vllm.sleeping_worker.SleepingWorker")
    try:
        source.ask("sleep", level=2)
        with files_away(weight_files(model)), pytest.raises(AssertionError, match="this engine has no weights"):
            source.ask("wake_up", tags=None)
        source.ask("wake_up", tags=None)
        after = source.ask("answers")["answers"]
    finally:
        source.ask("end")
    assert after == slept.answers == references.of(model)


def test_reloading_ends_the_offer_and_begins_another(
    awake: dict[str, Any], client: ServerClient, source: EngineHost
) -> None:
    source.ask("reload")
    assert status(client, awake) == p2p_pb2.SOURCE_STATUS_STALE
    assert source.ask("leave")["left"] == 1


def test_the_engines_end_frees_the_memory(
    client: ServerClient, source: EngineHost, model_paths: dict[str, Path]
) -> None:
    before = source.ask("live")["weights"]
    report = source.load(model_paths["llama"], keep=True).report
    assert source.ask("live")["weights"] == before + 1
    source.ask("end")

    assert status(client, report) == p2p_pb2.SOURCE_STATUS_STALE
    assert source.ask("live")["weights"] == before

"""Fixed roles between real engines: mx-source reads storage and offers raw weights, mx-target only pulls."""

from __future__ import annotations

import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mxbench.demo.models import weight_files
from mxbench.demo.processes import files_away
from tests.vllm.conftest import References
from tests.vllm.engines import ANSWER_SECONDS, EngineHost

PROCESSED = {"layout": "processed"}


def test_a_target_takes_raw_weights_of_a_source(
    source: EngineHost, target: EngineHost, references: References, model_paths: dict[str, Path]
) -> None:
    model = model_paths["qwen3"]
    first = source.load(model, "mx-source")
    with files_away(weight_files(model)):
        second = target.load(model, "mx-target")

    assert first.answers == second.answers == references.of(model)
    assert (first.report["path"], first.report["layout"], first.report["serving"]) == ("storage", "raw", True)
    assert (second.report["path"], second.report["layout"], second.report["serving"]) == ("p2p", "raw", False)
    assert second.report["source_worker"] == first.report["worker_id"]
    assert first.report["fallbacks"] == second.report["fallbacks"] == []
    assert "raw weights are kept for other workers: " in first.log


def test_a_source_never_pulls(source: EngineHost, target: EngineHost, model_paths: dict[str, Path]) -> None:
    model = model_paths["llama"]
    assert source.load(model).report["serving"]
    second = target.load(model, "mx-source")

    assert (second.report["path"], second.report["serving"]) == ("storage", True)
    assert [step["rung"] for step in second.report["paths"] if step["outcome"] == "loaded"] == ["engine"]


def test_a_target_never_reads_storage(target: EngineHost, model_paths: dict[str, Path]) -> None:
    """The files are there, and it fails all the same: one error that says what it waited for and what to do."""
    with pytest.raises(AssertionError, match="NoSource") as raised:
        target.load(model_paths["llama"], "mx-target", {"source_wait_seconds": 1})

    message = str(raised.value).splitlines()[0]
    assert "within 1 s (MX_SOURCE_WAIT_SECS)" in message
    assert "--load-format mx-source" in message


def test_a_target_without_a_server_fails_at_once(target: EngineHost, model_paths: dict[str, Path]) -> None:
    with pytest.raises(AssertionError, match="no server is set"):
        target.load(model_paths["llama"], "mx-target", {"server_address": None})


def test_a_target_waits_for_its_source(
    source: EngineHost, target: EngineHost, references: References, model_paths: dict[str, Path]
) -> None:
    model = model_paths["llama"]
    expected = references.of(model)
    before = target.log.stat().st_size
    with ThreadPoolExecutor(1) as pool:
        second = pool.submit(target.load, model, "mx-target")
        deadline = time.monotonic() + ANSWER_SECONDS
        while b"waiting for a source of raw weights" not in target.log.read_bytes()[before:]:
            assert time.monotonic() < deadline
            assert not second.done(), second.result()
            time.sleep(0.05)
        first = source.load(model, "mx-source")
        loaded = second.result()

    assert loaded.answers == expected
    assert loaded.report["source_worker"] == first.report["worker_id"]


def test_a_model_name_makes_two_paths_one_model(
    source: EngineHost, target: EngineHost, references: References, model_paths: dict[str, Path], tmp_path: Path
) -> None:
    here, there = model_paths["llama"], tmp_path / "elsewhere"
    shutil.copytree(here, there, ignore=shutil.ignore_patterns("*.safetensors*"))
    name = {"MODEL_NAME": "org/llama"}

    source.load(here, "mx-source", name)
    second = target.load(there, "mx-target", name)

    assert second.report["path"] == "p2p"
    assert second.answers == references.of(here)


def test_a_source_that_keeps_both_serves_both(
    source: EngineHost, target: EngineHost, unpacked: None, model_paths: dict[str, Path]
) -> None:
    model = model_paths["llama"]
    expected = source.load(model, "auto").answers
    first = source.load(model, extra={**PROCESSED, "source_keep": "both"})
    with files_away(weight_files(model)):
        processed = target.load(model, extra=PROCESSED)
        target.ask("leave")
        raw = target.load(model, "mx-target")

    offers = {offer["layout"]: offer for offer in first.report["offers"]}
    assert sorted(offers) == ["processed", "raw"]
    assert offers["raw"]["source_id"] != offers["processed"]["source_id"]
    assert (processed.report["layout"], raw.report["layout"]) == ("processed", "raw")
    assert processed.report["source_worker"] == offers["processed"]["worker_id"]
    assert raw.report["source_worker"] == offers["raw"]["worker_id"]
    assert first.answers == processed.answers == raw.answers == expected


def test_raw_weights_do_where_nobody_has_processed_ones(
    source: EngineHost, target: EngineHost, unpacked: None, model_paths: dict[str, Path]
) -> None:
    """And the worker that took them offers what it made of them."""
    model = model_paths["llama"]
    expected = source.load(model, "auto").answers
    source.load(model, "mx-source")
    with files_away(weight_files(model)):
        second = target.load(model, extra=PROCESSED)
        source.ask("leave")
        third = source.load(model, extra=PROCESSED)

    assert (second.report["path"], second.report["layout"], second.report["serving"]) == ("p2p", "raw", True)
    assert [offer["layout"] for offer in second.report["offers"]] == ["processed"]
    assert (third.report["path"], third.report["layout"]) == ("p2p", "processed")
    assert third.report["source_worker"] == second.report["worker_id"]
    assert second.answers == third.answers == expected

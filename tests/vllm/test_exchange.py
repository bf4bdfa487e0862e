"""Weights out of one real engine, in another process, into another real engine: answers equal in every bit."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from mxbench.demo.models import weight_files
from mxbench.demo.processes import files_away
from tests.vllm.conftest import References
from tests.vllm.engines import EngineHost

OPTIONS: dict[str, dict[str, Any]] = {"llama": {}, "qwen3": {}, "minilm": {"runner": "pooling"}}


@pytest.mark.parametrize("name", sorted(OPTIONS))
def test_raw_weights_move_between_stock_engines(
    name: str, source: EngineHost, target: EngineHost, references: References, model_paths: dict[str, Path], page: str
) -> None:
    model = model_paths[name]
    expected = references.of(model, **OPTIONS[name])

    first = source.load(model, **OPTIONS[name])
    with files_away(weight_files(model)):
        second = target.load(model, **OPTIONS[name])

    assert first.answers == expected
    assert second.answers == expected
    assert (first.report["path"], first.report["layout"], first.report["serving"]) == ("storage", "raw", True)
    assert (second.report["path"], second.report["layout"], second.report["serving"]) == ("p2p", "raw", True)
    assert first.report["fallbacks"] == second.report["fallbacks"] == []
    assert second.report["source_worker"] == first.report["worker_id"]
    assert second.report["source_id"] == first.report["source_id"]
    assert second.report["bytes"] == first.report["bytes"] > 0
    assert second.report["tensors"] == first.report["tensors"] > 0
    assert second.report["chunks_verified"] >= 1
    assert f"{second.report['bytes']} bytes" in second.log
    told = {load["worker_id"]: load for load in finished_loads(page)}
    assert told[first.report["worker_id"]]["path"] == "storage"
    one = told[second.report["worker_id"]]
    assert one["path"].startswith("peer_")
    assert (one["bytes"], one["from_worker_id"]) == (second.report["bytes"], first.report["worker_id"])
    assert one["chunks_verified"] == second.report["chunks_verified"]


def finished_loads(page: str) -> list[dict[str, Any]]:
    """What workers have told the server about their loads."""
    with urllib.request.urlopen(f"{page}/status", timeout=120) as answer:  # noqa: S310 - this machine
        loads: list[dict[str, Any]] = json.load(answer)["finished_loads"]
    return loads


@pytest.mark.parametrize("name", sorted(OPTIONS))
def test_processed_weights_move_where_nothing_packs_them(
    name: str, source: EngineHost, target: EngineHost, unpacked: None, model_paths: dict[str, Path]
) -> None:
    model = model_paths[name]
    options = {**OPTIONS[name], "extra": {"layout": "processed"}}
    expected = source.load(model, "auto", **OPTIONS[name]).answers
    first = source.load(model, **options)
    with files_away(weight_files(model)):
        second = target.load(model, **options)

    assert first.answers == second.answers == expected
    assert (second.report["path"], second.report["layout"]) == ("p2p", "processed")
    assert second.report["fallbacks"] == []


def test_weights_that_are_packed_away_are_refused_by_name(
    source: EngineHost, references: References, model_paths: dict[str, Path]
) -> None:
    loaded = source.load(model_paths["qwen3"], extra={"layout": "processed"})

    assert loaded.answers == references.of(model_paths["qwen3"])
    if loaded.report["serving"]:
        # vLLM says so once a process, of its first layer that oneDNN cannot make, whichever model that is of.
        assert "Failed to create oneDNN linear" in source.log.read_text(errors="replace")
        pytest.skip("vLLM packs no weights away on this processor: its oneDNN makes no linear layer (no AVX-512)")
    assert (loaded.report["path"], loaded.report["serving"]) == ("storage", False)
    (fallback,) = loaded.report["fallbacks"]
    assert "qkv_proj" in fallback
    assert "MX_LAYOUT_UNSUPPORTED" in fallback


def test_a_received_worker_is_a_source(
    source: EngineHost, target: EngineHost, references: References, model_paths: dict[str, Path]
) -> None:
    model = model_paths["llama"]
    source.load(model)
    with files_away(weight_files(model)):
        second = target.load(model)
        source.ask("leave")
        third = source.load(model)

    assert third.report["source_worker"] == second.report["worker_id"]
    assert third.answers == references.of(model)


def test_kinds_never_mix(
    source: EngineHost, target: EngineHost, references: References, model_paths: dict[str, Path]
) -> None:
    """Who wants processed weights does not take raw ones for such; it may take them as what they are."""
    model = model_paths["llama"]
    raw = source.load(model)
    second = target.load(model, extra={"layout": "processed"})

    assert raw.report["serving"]
    steps = [(step["rung"], step["outcome"]) for step in second.report["paths"]]
    assert steps == [("p2p", "skipped"), ("p2p", "loaded")]
    assert (second.report["path"], second.report["layout"]) == ("p2p", "raw")
    assert second.answers == references.of(model)


def test_memory_is_held_while_it_is_served_and_no_longer(source: EngineHost, model_paths: dict[str, Path]) -> None:
    before = source.ask("live")["weights"]
    source.load(model_paths["llama"])
    held = source.ask("live")["weights"]
    assert source.ask("leave")["left"] == 1

    assert held == before + 1
    assert source.ask("live")["weights"] == before

"""Expert load balancing: weights are offered, and taken, until vLLM moves experts for the first time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.vllm import families
from tests.vllm.engines import EngineHost, Loaded


def start(host: EngineHost, model: Path) -> Loaded:
    worker = "tests.vllm.balancing_worker.BalancingWorker"
    return host.load(model, "mx", ask="move_experts", worker_cls=worker)


def test_offers_end_before_experts_are_moved_and_the_reason_is_told(source: EngineHost, folder: Path) -> None:
    loaded = start(source, families.generate(folder / "balancing" / "qwen3_moe", "qwen3_moe"))
    [answer] = loaded.answers

    assert loaded.report["serving"]
    [offer] = loaded.report["offers"]
    assert offer["until"] == "its first rearrangement of experts, --enable-eplb"
    assert (answer["before"], answer["after"], answer["stopped"]) == (1, 0, "")
    assert f"no longer serving: the engine's weights are changed ({offer['until']})" in loaded.log


def test_workers_with_and_without_balancing_share_nothing(
    source: EngineHost, target: EngineHost, folder: Path, model_paths: dict[str, Any]
) -> None:
    model = families.generate(folder / "balancing" / "qwen3_moe", "qwen3_moe")
    source.load(model)
    assert start(target, model).report["path"] == "storage"

"""Parts of the demo and of `mx bench vllm` that need no engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mxbench.demo.workers import Worker
from mxbench.engine import loads as bench_vllm


def report(**changes: Any) -> dict[str, Any]:
    made = {"path": "p2p", "tensors": 3, "bytes": 1000, "chunks_verified": 1, "seconds": 0.5}
    return {**made, "gigabytes_per_second": 0.0, **changes}


def worker(folder: Path, *reports: dict[str, Any]) -> Worker:
    made = Worker.__new__(Worker)  # no process
    made.ranks, made.report_path = 2, folder / "report.json"
    for rank, each in enumerate(reports):
        (folder / ("report.json" if not rank else f"report.json.rank{rank}")).write_text(json.dumps(each))
    return made


def test_reports_of_ranks_are_one_row(tmp_path: Path) -> None:
    whole = worker(tmp_path, report(), report(bytes=500, seconds=0.25)).report()
    assert (whole["path"], whole["ranks"]) == ("p2p", 2)
    assert (whole["tensors"], whole["bytes"], whole["chunks_verified"], whole["seconds"]) == (6, 1500, 2, 0.5)
    assert whole["gigabytes_per_second"] == pytest.approx(3e-6)


def test_one_rank_from_storage_is_no_p2p(tmp_path: Path) -> None:
    assert worker(tmp_path, report(), report(path="storage")).report()["path"] == "storage"


def test_a_rank_without_a_report_is_none(tmp_path: Path) -> None:
    assert worker(tmp_path, report()).report() == {}


def test_own_seconds_are_what_neither_the_engine_nor_the_bytes_take() -> None:
    steps = {"total": 2.0, "join": 0.1, "build": 0.5, "fill": 0.7, "process": 0.4, "keep": 0.2, "offer": 0.1}
    found = bench_vllm.with_own(steps, 0.3)
    assert found["own"] == pytest.approx(0.8)
    assert found["bytes"] == 0.3
    assert bench_vllm.with_own({"total": 0.1}, 0.3)["own"] == 0.0


def test_the_figure_is_that_of_the_slowest_model() -> None:
    def ways(own: float) -> dict[str, dict[str, float]]:
        return {"p2p": {"total": own + 1, "own": own, "bytes": 0.01}}

    figures = bench_vllm.figures_of({"a": ways(0.2), "b": ways(0.4)})
    assert figures["own_seconds"] == 0.4
    assert figures["a_p2p_total_seconds"] == 1.2
    lines = bench_vllm.table({"a": ways(0.2)}).splitlines()
    assert len(lines) == 2
    assert lines[1].split()[:3] == ["a", "p2p", "1.200"]


def test_copying_takes_time() -> None:
    assert bench_vllm.copy_seconds(1 << 20) > 0

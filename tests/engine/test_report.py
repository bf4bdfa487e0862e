"""The load's report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mxcore.engine.report import LoadReport


def test_json_has_every_field_and_the_rate(tmp_path: Path) -> None:
    report = LoadReport(model="m", path="p2p", bytes=3_000_000_000, seconds=1.5, chunks_verified=7)
    report.write(str(tmp_path / "report.json"))

    written = json.loads((tmp_path / "report.json").read_text())
    assert written["gigabytes_per_second"] == 2.0
    assert written["path"] == "p2p"
    assert written["chunks_verified"] == 7
    assert written["fallbacks"] == []
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


@pytest.mark.parametrize(
    ("path", "rank", "name"),
    [("r.json", 0, "r.json"), ("r.json", 3, "r.json.rank3"), ("r-{rank}.json", 3, "r-3.json")],
)
def test_ranks_do_not_write_over_each_other(tmp_path: Path, path: str, rank: int, name: str) -> None:
    LoadReport(model="m", rank=rank).write(str(tmp_path / path))
    assert (tmp_path / name).is_file()


def test_the_line_says_where_the_weights_came_from() -> None:
    report = LoadReport(model="m", path="p2p", source_worker="w1", transport="tcp", operation="write", layout="raw")
    assert "p2p from worker w1 (tcp, write)" in report.line()
    assert "no fallbacks" in report.line()
    assert "not serving" in report.line()

    report = LoadReport(
        model="m",
        fallbacks=["joining: no server is set"],
        serving=True,
        worker_id="w2",
    )
    assert report.line().startswith("m rank 0: storage, 0.000 s, layout none, serving as w2")
    assert "serving as w2" in report.line()
    assert "fallbacks: joining: no server is set" in report.line()


def test_the_line_counts_only_what_was_counted() -> None:
    """An operator who reads `0 tensors, 0 bytes` of a load that went well looks for what is broken."""
    alone = LoadReport(model="m", seconds=0.9, fallbacks=["joining: no server is set"]).line()
    assert "m rank 0: storage, 0.900 s, layout none" in alone
    assert "tensors" not in alone
    assert "chunks verified" not in alone
    offered = LoadReport(model="m", seconds=2.0, tensors=21, bytes=4_000_000_000).line()
    assert "storage, 21 tensors, 4000000000 bytes in 2.000 s (2.00 GB/s), layout none" in offered
    received = LoadReport(model="m", path="p2p", seconds=2.0, tensors=21, bytes=4_000_000_000, chunks_verified=239)
    assert "(2.00 GB/s), 239 chunks verified, layout none" in received.line()


def test_nothing_measured_is_no_rate() -> None:
    assert LoadReport(model="m", bytes=1).gigabytes_per_second == 0.0


def test_a_folder_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="nowhere"):
        LoadReport(model="m").write(str(tmp_path / "nowhere" / "report.json"))

"""Workers of several ranks, and checkpoints that share a name: who may take whose weights."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from bench.demo import models
from bench.demo.models import weight_files
from bench.demo.processes import files_away
from tests.vllm import families
from tests.vllm.conftest import LLAMA
from tests.vllm.engines import EngineHost


def test_tensor_parallel_workers_take_from_their_own_rank(
    source: EngineHost, target: EngineHost, model_paths: dict[str, Path]
) -> None:
    """Two processes an engine: each rank of the target has the bytes of the same rank of the source.

    The barriers are on: ranks of the source are offered together, those of the target begin together.
    """
    model = model_paths["llama"]
    expected = source.load(model, "auto", tensor_parallel_size=2).answers

    first = source.load(model, "mx-source", {"sync_publish": True}, keep=True, tensor_parallel_size=2)
    try:
        with files_away(weight_files(model)):
            second = target.load(model, "mx-target", {"sync_start": True}, tensor_parallel_size=2)
    finally:
        source.ask("end")

    assert first.answers == second.answers == expected
    assert "waiting for all 2 ranks of this source" in first.log
    ranks = [first.ranks(2), second.ranks(2)]
    assert [[report["rank"] for report in reports] for reports in ranks] == [[0, 1], [0, 1]]
    assert {report["path"] for report in ranks[1]} == {"p2p"}
    assert [report["source_worker"] for report in ranks[1]] == [report["worker_id"] for report in ranks[0]]
    offered = {report["source_id"] for report in ranks[0]}
    assert len(offered) == 1
    assert offered != {""}
    assert [report["serving"] for report in ranks[1]] == [False, False]  # a target offers nothing


def test_two_checkpoints_under_one_path_never_mix(source: EngineHost, target: EngineHost, tmp_path: Path) -> None:
    model = models.generate(tmp_path / "model", "llama", LLAMA, seed=1)
    other = models.generate(tmp_path / "other", "llama", LLAMA, seed=2)
    first = source.load(model)
    assert first.report["serving"]
    for file in weight_files(other):
        shutil.copy(file, model / file.name)

    second = target.load(model)

    assert second.report["path"] == "storage"
    assert second.report["source_id"] != first.report["source_id"]
    assert second.answers == target.load(model, "auto").answers != first.answers

    with files_away(weight_files(model)), pytest.raises(AssertionError, match="load: "):
        target.load(model)  # nothing tells here which of the two it is: no guess


def test_parallel_settings_in_the_identity(source: EngineHost, folder: Path) -> None:
    model = families.generate(folder / "families" / "qwen3_moe", "qwen3_moe")

    def identity(**options: object) -> dict[str, object]:
        answer = source.ask("identity", model=str(model), kind="raw", environ={}, options=options)
        found: dict[str, object] = answer["identity"]
        return found

    alone = identity()
    assert identity(tensor_parallel_size=2) == {**alone, "tensor_parallel_size": 2}
    assert identity(pipeline_parallel_size=2) == {**alone, "pipeline_parallel_size": 2}
    assert identity(data_parallel_size=2) == alone  # replicas of one layout
    experts = identity(tensor_parallel_size=2, data_parallel_size=2, enable_expert_parallel=True)
    assert experts == {**alone, "tensor_parallel_size": 2, "expert_parallel_size": 4}
    assert identity(enable_lora=True) == alone

"""Workers of several ranks, and checkpoints that share a name: who may take whose weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from mxbench.demo import models
from mxbench.demo.models import weight_files
from mxbench.demo.processes import files_away
from mxbench.fleet.free_ports import free_port
from mxcore import publish
from tests.metrics.test_metrics import metric
from tests.vllm import drafts, families
from tests.vllm.conftest import LLAMA
from tests.vllm.engines import EngineHost, Loaded
from tests.vllm.updated import TRANSFER, as_loaded, now, versions_of
from tests.web.conftest import wait_for

REPLICA = [f"VLLM_DP_{name}" for name in ("SIZE", "RANK", "RANK_LOCAL", "MASTER_IP", "MASTER_PORT")]
Replicas = Callable[..., list[Loaded]]
WORKER = {"worker_cls": "tests.vllm.parallel_worker.ParallelWorker"}
FIXED = (("mx-source", {"sync_publish": True}), ("mx-target", {"sync_start": True}))
PROCESSED = (("mx", {"layout": "processed"}), ("mx", {"layout": "processed"}))


@pytest.fixture(scope="module")
def experts(folder: Path) -> Path:
    return families.generate(folder / "families" / "qwen3_moe", "qwen3_moe")


@pytest.fixture(scope="module")
def ranked(folder: Path, server: str) -> Iterator[tuple[EngineHost, EngineHost]]:
    """Two processes whose engines have workers in processes of their own."""
    hosts = EngineHost("ranked-source", folder, server), EngineHost("ranked-target", folder, server)
    for host in hosts:
        host.ask("hiding", wider=False)
        host.ask("fork_workers")
        host.ask("plain_linear", on=True)
    yield hosts
    for host in hosts:
        host.close()


def test_one_bad_rank_sends_all_ranks_to_storage(
    ranked: tuple[EngineHost, EngineHost], model_paths: dict[str, Path]
) -> None:
    """Processing asks all ranks here: before, the good one was done and the bad one waited for it for ever."""
    source, target = ranked
    options = {
        "tensor_parallel_size": 2,
        "quantization": "mx_shared_scale",
        "worker_extension_cls": "tests.vllm.corrupting.CorruptingExtension",
    }
    processed = {"layout": "processed"}
    model = model_paths["llama"]
    expected = source.load(model, "auto", **options).answers
    first = source.load(model, "mx", processed, keep=True, ask="corrupt_rank_1", **options)
    try:
        assert sorted(first.answers)[0] == 0 < sorted(first.answers)[1], "rank 1 alone was changed"
        second = target.load(model, "mx", processed, **options)
    finally:
        source.ask("end")
    assert second.answers == expected
    assert [report["path"] for report in second.ranks(2)] == ["storage", "storage"]
    good = second.ranks(2)[0]
    assert any("process 1" in line for line in good["fallbacks"]), good["fallbacks"]


@pytest.mark.parametrize(
    ("name", "formats", "options"),
    [
        ("llama", FIXED, {"tensor_parallel_size": 2}),
        ("llama", FIXED, {"tensor_parallel_size": 4}),
        ("llama", FIXED, {"pipeline_parallel_size": 2, **WORKER}),
        ("qwen3_moe", PROCESSED, {"tensor_parallel_size": 2, "enable_expert_parallel": True, **WORKER}),
    ],
    ids=["tensor", "four", "pipeline", "expert"],
)
def test_workers_take_from_their_own_rank(
    name: str,
    formats: tuple[tuple[str, dict[str, Any]], ...],
    options: dict[str, Any],
    ranked: tuple[EngineHost, EngineHost],
    model_paths: dict[str, Path],
    experts: Path,
) -> None:
    """Two workers an engine, or four: each rank of the target has the bytes of the same rank of the source.

    With fixed roles the barriers are on: ranks of the source are offered together, those of the target begin together.
    """
    source, target = ranked
    model = experts if name == "qwen3_moe" else model_paths[name]
    (first_format, first_extra), (second_format, second_extra) = formats
    expected = source.load(model, "auto", **options).answers
    count = options.get("tensor_parallel_size", 1) * options.get("pipeline_parallel_size", 1)
    port = free_port()

    first = source.load(model, first_format, {**first_extra, "metrics_port": port}, keep=True, **options)
    try:
        wait_for(lambda: metric(port, "mxworker_ranks") == count)  # one endpoint for all ranks of an engine
        assert metric(port, "mxworker_serving") == count
        assert metric(port, 'mxworker_loads_total{path="storage"}') == count
        with files_away(weight_files(model)):
            second = target.load(model, second_format, second_extra, **options)
    finally:
        source.ask("end")

    assert first.answers == second.answers == expected
    ranks = [first.ranks(count), second.ranks(count)]
    assert [[report["rank"] for report in reports] for reports in ranks] == [list(range(count))] * 2
    assert {report["path"] for report in ranks[1]} == {"p2p"}
    assert [report["source_worker"] for report in ranks[1]] == [report["worker_id"] for report in ranks[0]]
    offered = {report["source_id"] for report in ranks[0]}
    assert len(offered) == 1
    assert offered != {""}
    if formats is FIXED:
        assert f"waiting for all {count} ranks of this source" in first.log
        assert not any(report["serving"] for report in ranks[1])  # a target offers nothing


@pytest.fixture
def replicas(source: EngineHost, target: EngineHost, unpacked: None) -> Iterator[Replicas]:
    """The two processes as replicas of one engine with data parallelism."""
    hosts = source, target

    def load(model: Path, *args: Any, **kwargs: Any) -> list[Loaded]:
        port = str(free_port(following=1))  # one group there, the next on the port after it; vLLM waits long for either
        for rank, host in enumerate(hosts):
            values = ("2", str(rank), str(rank), "127.0.0.1", port)
            host.ask("setenv", environ=dict(zip(REPLICA, values, strict=True)))
        with ThreadPoolExecutor(2) as pool:
            begun = [pool.submit(host.load, model, *args, **kwargs) for host in hosts]
            return [each.result() for each in begun]

    yield load
    for host in hosts:
        host.ask("setenv", environ=dict.fromkeys(REPLICA))


@pytest.mark.parametrize("together", [False, True], ids=["split", "expert_parallel"])
def test_replicas_hold_different_parts_of_the_experts(together: bool, replicas: Replicas, experts: Path) -> None:
    """With and without expert parallelism the shapes are the same on both replicas, and the experts are not.

    Bytes are compared: vLLM's CPU build cannot pass activations between replicas.
    """
    options = {"enable_expert_parallel": together, "distributed_executor_backend": "uni", **WORKER}
    expected = [loaded.answers for loaded in replicas(experts, "auto", ask="weights_digest", **options)]
    first = replicas(experts, ask="weights_digest", **options)
    with files_away(weight_files(experts)):
        second = replicas(experts, ask="weights_digest", **options)

    assert expected[0] != expected[1]
    assert [loaded.answers for loaded in first] == [loaded.answers for loaded in second] == expected
    before, after = ([load.of_rank(rank) for rank, load in enumerate(loads)] for loads in (first, second))
    assert [report["rank"] for report in after] == [0, 1]
    assert [report["path"] for report in after] == ["p2p", "p2p"]
    assert [report["source_worker"] for report in after] == [report["worker_id"] for report in before]


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


def identity(source: EngineHost, model: Path, **options: Any) -> tuple[dict[str, Any], str]:
    """The fields, and what is said of experts beside them."""
    found = source.ask("identity", model=str(model), kind="raw", environ={}, options=options)["identity"]
    return found, found["extra_parameters"].pop("experts", "")


def test_parallel_settings_in_the_identity(source: EngineHost, model_paths: dict[str, Path]) -> None:
    model = model_paths["llama"]
    alone, said = identity(source, model)
    assert identity(source, model, tensor_parallel_size=2) == ({**alone, "tensor_parallel_size": 2}, "")
    assert identity(source, model, pipeline_parallel_size=2) == ({**alone, "pipeline_parallel_size": 2}, "")
    assert identity(source, model, data_parallel_size=2) == (alone, said) == (alone, "")  # replicas of one layout
    assert identity(source, model, enable_lora=True) == (alone, "")


def test_experts_in_the_identity(source: EngineHost, experts: Path) -> None:
    alone, said = identity(source, experts)
    two = {**alone, "tensor_parallel_size": 2}
    assert said == ""
    assert identity(source, experts, tensor_parallel_size=2) == (two, "")
    assert identity(source, experts, data_parallel_size=2) == (alone, "data=2 context=1 placement=")
    together = {"tensor_parallel_size": 2, "enable_expert_parallel": True}
    assert identity(source, experts, **together) == ({**two, "expert_parallel_size": 2}, "")
    four = {**two, "expert_parallel_size": 4}
    assert identity(source, experts, data_parallel_size=2, **together) == (four, "data=2 context=1 placement=linear")
    dealt_out = identity(source, experts, expert_placement_strategy="round_robin", **together)[1]
    assert dealt_out == "data=1 context=1 placement=round_robin"


def test_all_ranks_take_another_version_or_none(ranked: tuple[EngineHost, EngineHost], folder: Path) -> None:
    """Rank 1 fails where rank 0 has written: at a transfer, and both take storage; at processing, and both go back."""
    source, target = ranked
    versions = versions_of(folder, "llama")
    options = {"tensor_parallel_size": 2}
    processed = {"layout": "processed"}
    expected = {model: target.load(model, "auto", **options).answers for model in versions}
    bad = {"worker_extension_cls": "tests.vllm.corrupting.CorruptingExtension"}
    cut = {"worker_extension_cls": "tests.vllm.cutting.CuttingExtension"}
    first = source.load(versions.two, "mx", processed, keep=True, ask="corrupt_rank_1", **options, **bad)
    assert sorted(first.answers)[0] == 0 < sorted(first.answers)[1], "rank 1 alone was changed"
    loaded = target.load(versions.one, "mx", processed, keep=True, **options, **cut, **TRANSFER)

    def update(model: Path) -> tuple[str, list[str]]:
        """The error, and the versions that all ranks have, whole."""
        told = target.ask("update", info={"path": str(model)})
        states = [state["models"][0] for state in told["states"]]
        assert all(state["ready"] for state in states)
        return told["error"], [state["version"] for state in states]

    try:
        assert update(versions.two) == ("", [str(versions.two)] * 2)
        reports = [json.loads(path.read_text()) for path in reports_of(loaded)]
        assert [report["path"] for report in reports] == ["storage"] * 2
        assert any("process 1: " in line and "MX_DIGEST_MISMATCH" in line for line in reports[0]["fallbacks"])
        assert target.ask("answers")["answers"] == expected[versions.two]
        target.ask("rpc", method="cut_rank_1", args=[9])
        error, both = update(versions.one)
        assert "is again: " in error
        assert both == [str(versions.two)] * 2
        assert target.ask("answers")["answers"] == expected[versions.two]
        assert update(versions.one) == ("", [str(versions.one)] * 2)
        assert target.ask("answers")["answers"] == expected[versions.one]
    finally:
        source.ask("end")
        target.ask("end")


def test_all_ranks_take_what_a_trainer_publishes(
    ranked: tuple[EngineHost, EngineHost], folder: Path, server: str
) -> None:
    """Each its own part of the whole tensors, as vLLM's default loader cuts them."""
    target = ranked[1]
    versions = versions_of(folder, "llama")
    options = {"tensor_parallel_size": 2}
    expected = {model: as_loaded(target, model, **options) for model in versions}
    tensors = {name: tensor for file in weight_files(versions.two) for name, tensor in load_file(file).items()}
    target.load(versions.one, keep=True, **options, **TRANSFER)
    try:
        with publish("ranked", tensors, 1, server=server, settings={"MX_WORKER_HOST": "127.0.0.1"}) as published:
            told = target.ask("update", info={"uri": published.uri, "version": "step 1"})
        states = [state["models"][0] for state in told["states"]]
        assert (told["error"], [(state["version"], state["ready"]) for state in states]) == ("", [("step 1", True)] * 2)
        assert now(target) == expected[versions.two]
        target.ask("update", info={"path": str(versions.one)})
        assert now(target) == expected[versions.one]
    finally:
        target.ask("end")


def reports_of(loaded: Loaded) -> list[Path]:
    """Of both ranks' last update."""
    name = f"{loaded.report_path.name}.update"
    return [loaded.report_path.with_name(each) for each in (name, f"{name}.rank1")]


def test_each_rank_takes_its_part_of_a_draft(
    ranked: tuple[EngineHost, EngineHost], folder: Path, model_paths: dict[str, Path]
) -> None:
    source, target = ranked
    model = model_paths["llama"]
    head = drafts.eagle(folder / "ranked-eagle", model, own_embedding=True)
    options = {
        "tensor_parallel_size": 2,
        "speculative_config": {"method": "eagle", "model": str(head), "num_speculative_tokens": 1},
        "worker_cls": "tests.vllm.draft_worker.DraftWorker",
        "ask": "draft_digests",
    }
    expected = source.load(model, "auto", **options).answers
    first = source.load(model, "mx", keep=True, **options)
    try:
        with files_away([*weight_files(model), *weight_files(head)]):
            second = target.load(model, "mx", **options)
    finally:
        source.ask("end")

    assert first.answers == second.answers == expected
    assert expected[0] != expected[1]
    before, after = first.ranks(2, part="draft"), second.ranks(2, part="draft")
    assert [report["path"] for report in (*second.ranks(2), *after)] == ["p2p"] * 4
    assert [report["source_worker"] for report in after] == [report["worker_id"] for report in before]
    assert [report["rank"] for report in after] == [0, 1]

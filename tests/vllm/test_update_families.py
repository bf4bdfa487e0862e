"""Each family of models takes another version and the old one again, with weights that vLLM packs away and without.

On the way the update is cut, once at each of some modules drawn by a seed: then the engine has the old version.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from mxbench.demo.models import weight_files
from tests.vllm import drafts
from tests.vllm.engines import EngineHost
from tests.vllm.test_families import AVX512_ALONE
from tests.vllm.updated import OPTIONS, TRANSFER, addresses, as_loaded, now, update, versions_of

NAMES = (
    "awq",
    "classifier",
    "compressed_tensors",
    "deepseek_v3",
    "gemma",
    "gptq",
    "llama",
    "minilm",
    "mixtral",
    "qwen3",
    "qwen3_moe",
)
CUTS = 4
MODULES = 20  # fewer than each of them has


@pytest.fixture(params=["packed", "plain"])
def packing(request: pytest.FixtureRequest, target: EngineHost) -> Iterator[str]:
    """What engines of the process do with linear layers: pack them away, as without a test, or leave them."""
    target.ask("plain_linear", on=request.param == "plain")
    yield request.param
    target.ask("plain_linear", on=False)


@pytest.mark.parametrize("name", NAMES)
def test_there_and_back(name: str, packing: str, folder: Path, target: EngineHost) -> None:
    if name in AVX512_ALONE and "avx512f" not in Path("/proc/cpuinfo").read_text():
        pytest.skip(f"vLLM's CPU build has no kernel of {name} for this processor, which lacks AVX-512")
    versions, options = versions_of(folder, name), OPTIONS.get(name, {})
    expected = {model: as_loaded(target, model, **options) for model in versions}
    assert expected[versions.one]["answers"] != expected[versions.two]["answers"]
    target.load(versions.one, keep=True, **options, **TRANSFER)
    before = addresses(target)
    try:
        for after in random.Random(name + packing).sample(range(1, MODULES), CUTS):
            target.ask("call", function="tests.vllm.cutting:cut", arguments={"after": after})
            told = target.ask("update", info={"path": str(versions.two)})
            assert f"{versions.one} is again: " in told["error"], after
            assert now(target) == expected[versions.one], after
        for model in (versions.two, versions.one):
            update(target, path=str(model))
            assert now(target) == expected[model]
        assert addresses(target) == before
    finally:
        target.ask("end")


def test_a_draft_changes_when_it_is_named_and_no_sooner(folder: Path, target: EngineHost) -> None:
    versions = versions_of(folder, "llama")
    head = drafts.eagle(folder / "versions" / "eagle", versions.one, own_embedding=True)
    other = shutil.copytree(head, folder / "versions" / "eagle-2", dirs_exist_ok=True)
    _changed(other)
    options = {
        "speculative_config": {"method": "eagle", "model": str(head), "num_speculative_tokens": 1},
        "worker_cls": "tests.vllm.draft_worker.DraftWorker",
    }
    target.load(versions.one, keep=True, **options, **TRANSFER)
    try:
        answers, digests = now(target), target.ask("rpc", method="draft_digests")["given"]
        update(target, path=str(versions.two))
        assert now(target)["digests"] != answers["digests"]
        after = target.ask("rpc", method="draft_digests")["given"]
        assert own(after) == own(digests)
        told = target.ask("update", info={"path": str(other)}, draft=True)
        assert told["error"] == ""
        assert [model["version"] for model in told["states"][0]["models"]] == [str(versions.two), str(other)]
        assert own(target.ask("rpc", method="draft_digests")["given"]) != own(digests)
        update(target, path=str(versions.one))
        assert now(target) == answers
    finally:
        target.ask("end")


def own(digests: list[dict[str, str]]) -> list[dict[str, str]]:
    """Of a draft's tensors those that it does not share with the model."""
    return [{name: told for name, told in each.items() if "lm_head" not in name} for each in digests]


def _changed(head: Path) -> None:
    from safetensors.torch import load_file, save_file

    (file,) = weight_files(head)
    save_file({name: tensor * 2 for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("llama", "layers.1.self_attn.v_proj"),
        ("awq", "layers.1.self_attn.v_proj"),
        ("gptq", "layers.0.mlp.up_proj"),
        ("compressed_tensors", "layers.1.self_attn.k_proj"),
        ("qwen3_moe", "layers.1.mlp.experts.2.up_proj"),
    ],
)
def test_a_version_that_lacks_a_part_of_a_fused_tensor_is_refused(
    name: str, part: str, folder: Path, target: EngineHost
) -> None:
    """vLLM itself takes it: where the part belongs, a new engine has what lay in memory."""
    versions = versions_of(folder, name)
    lacking = shutil.copytree(versions.two, folder / "versions" / f"{name}-lacking", dirs_exist_ok=True)
    _without(lacking, part)
    target.load(versions.one, keep=True, **OPTIONS.get(name, {}), **TRANSFER)
    try:
        before = now(target)
        told = target.ask("update", info={"path": str(lacking)})
        assert "for parts of them" in told["error"]
        assert f"{versions.one} still is" in told["error"]
        assert now(target) == before
    finally:
        target.ask("end")


def _without(checkpoint: Path, part: str) -> None:
    from safetensors.torch import load_file, save_file

    names = 0
    for file in weight_files(checkpoint):
        tensors = load_file(file)
        kept = {name: tensor for name, tensor in tensors.items() if f"{part}." not in name}
        names += len(tensors) - len(kept)
        save_file(kept, file, metadata={"format": "pt"})
    assert names

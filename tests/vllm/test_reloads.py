"""`collective_rpc("reload_weights")`, vLLM's own way to get weights anew: as its default loader makes them, by each of
our places. vLLM's reload (0.32) is wrong on a CPU for experts, tied embeddings and int8."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from mxbench.demo import models
from mxbench.demo.models import weight_files
from mxbench.demo.processes import files_away
from tests.vllm import families, quantised
from tests.vllm.conftest import LLAMA
from tests.vllm.engines import EngineHost
from tests.vllm.test_update import as_loaded, now

_TIED = {**LLAMA, "tie_word_embeddings": True, "head_dim": 32}


def plain(folder: Path, seed: int) -> Path:
    return models.generate(folder / str(seed), "llama", LLAMA, seed=seed)


def tied(folder: Path, seed: int) -> Path:
    return models.generate(folder / str(seed), "qwen3", _TIED, seed=seed)


def experts(folder: Path, seed: int) -> Path:
    return families.generate(folder / str(seed), "qwen3_moe", seed=seed)


def int8(folder: Path, seed: int) -> Path:
    """The scales of the second one are others."""
    made = quantised.generate(folder / "1", "compressed_tensors")
    if seed == 1 or (folder / "2").exists():
        return folder / str(seed)
    shutil.copytree(made, folder / "2")
    for file in weight_files(folder / "2"):
        tensors = {
            name: tensor * (1.5 if "scale" in name else 1.0) if tensor.is_floating_point() else tensor
            for name, tensor in load_file(file).items()
        }
        save_file(tensors, file, {"format": "pt"})
    return folder / "2"


@pytest.mark.parametrize("made", [plain, tied, experts, int8])
def test_another_folder_and_the_first_one_again(
    source: EngineHost, folder: Path, made: Callable[[Path, int], Path]
) -> None:
    one, two = (made(folder / "reloads" / made.__name__, seed) for seed in (1, 2))
    expected = {model: as_loaded(source, model)["answers"] for model in (one, two)}
    assert expected[one] != expected[two]
    source.load(one, keep=True)
    try:
        for model in (two, one):
            source.ask("reload", path=str(model))
            assert now(source)["answers"] == expected[model]
        source.ask("reload")
        assert now(source)["answers"] == expected[one]
    finally:
        source.ask("end")


@pytest.mark.parametrize("rung", ["p2p", "uri", "engine"])
def test_the_same_weights_by_each_place(source: EngineHost, target: EngineHost, folder: Path, rung: str) -> None:
    """The server's cache: tests/vllm/test_load_paths.py; a published version: test_trained_versions.py."""
    model = plain(folder / "reloads" / "plain", 1)
    extra: dict[str, Any] = {"load_paths": rung} if rung != "p2p" else {}
    if rung == "uri":
        extra["model_uri"] = str(model)
    else:
        source.load(model, keep=True)
    loaded = target.load(model, extra=extra, keep=True)
    before = now(target)
    try:
        with files_away(weight_files(model)) if rung == "p2p" else nullcontext():
            target.ask("reload")
        assert now(target) == before
    finally:
        source.ask("end")
        target.ask("end")
    report = json.loads(Path(f"{loaded.report_path}.update").read_text())
    assert (report["path"], report["fallbacks"]) == ("storage" if rung == "engine" else rung, [])

"""What a trainer publishes, in running engines: as vLLM's default loader makes it of the same tensors."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mxbench.demo import models
from mxbench.demo.models import weight_files
from mxbench.demo.processes import ENGINE_ENVIRONMENT, clean_environment
from mxcore import publish
from tests.vllm.conftest import LLAMA
from tests.vllm.engines import EngineHost
from tests.vllm.test_update import TRANSFER, as_loaded, now, update

ROOT = Path(__file__).parents[2]
EXAMPLE_SECONDS = 300.0
ANSWER = re.compile(r"version (\d), (\d+) of (\d+) bytes: (\[.*\]), own (\[.*\])")


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in weight_files(folder) for name, tensor in load_file(file).items()}


@pytest.fixture(scope="module")
def trained(folder: Path) -> list[Path]:
    """One model after three steps of training; between the last two a part of it stays as it is."""
    place = folder / "trained"
    found = [models.generate(place / str(seed), "llama", LLAMA, seed=seed) for seed in (1, 2)]
    last = models.generate(place / "3", "llama", LLAMA, seed=2)
    for file in weight_files(last):
        tensors = load_file(file)
        tensors = {name: tensor * 2 if "layers.1" in name else tensor for name, tensor in tensors.items()}
        save_file(tensors, file, {"format": "pt"})
    return [*found, last]


def report_of(host: EngineHost, loaded: Any) -> dict[str, Any]:
    told: dict[str, Any] = json.loads(Path(f"{loaded.report_path}.update").read_text())
    return told


def test_published_versions_are_as_loaded_and_equal_chunks_are_not_sent(
    source: EngineHost, target: EngineHost, trained: list[Path], server: str
) -> None:
    """One engine takes each from the trainer; the other one takes the last from it, when the trainer has gone."""
    expected = [as_loaded(source, model) for model in trained]
    first = source.load(trained[0], keep=True, **TRANSFER)
    second = target.load(trained[0], keep=True, **TRANSFER)
    at: dict[str, Any] = {"server": server, "settings": {"MX_WORKER_HOST": "127.0.0.1"}}
    total = sum(tensor.nbytes for tensor in tensors_of(trained[0]).values())
    try:
        sent = []
        for version in (1, 2):
            with publish("llama", tensors_of(trained[version]), version, **at) as published:
                state = update(source, uri=published.uri, version=f"step {version}")
            assert now(source) == expected[version]
            assert (state["version"], state["place"]) == (f"step {version}", {"uri": published.uri})
            report = report_of(source, first)
            assert (report["path"], report["serving"], report["fallbacks"]) == ("p2p", True, [])
            sent.append(report["bytes"])
        assert sent[0] == total
        assert 0 < sent[1] < 0.6 * total
        update(target, uri="mx://llama/2")
        assert now(target) == expected[2]
        assert report_of(target, second)["bytes"] == total
        told = source.ask("update", info={"uri": "mx://llama/3"})
        assert "nobody has version 3 of 'llama'" in told["error"]
        assert now(source) == expected[2]
    finally:
        source.ask("end")
        target.ask("end")
    assert expected[0] != expected[1] != expected[2]


def test_the_example_serves_what_it_trains(server: str, folder: Path) -> None:
    """Each version's tokens are those of the trainer's own model, and the last ones those that it was taught."""
    names = {"MODEL_EXPRESS_URL": server, "MX_WORKER_HOST": "127.0.0.1", "VLLM_CACHE_ROOT": str(folder / "cache")}
    ran = subprocess.run(
        [sys.executable, "examples/train_and_serve.py"],
        cwd=ROOT,
        env={**clean_environment(), **ENGINE_ENVIRONMENT, **names},
        capture_output=True,
        text=True,
        timeout=EXAMPLE_SECONDS,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-6000:]
    found = [match.groups() for line in ran.stdout.splitlines() if (match := ANSWER.fullmatch(line))]
    assert [number for number, *_others in found] == ["1", "2", "3"], ran.stdout
    assert all(tokens == own for *_others, tokens, own in found)
    assert json.loads(found[-1][3]) == [17, 4, 30, 8, 9, 11]
    assert f"before training: {found[-1][3]}" not in ran.stdout
    given = [int(bytes_given) / int(total) for _number, bytes_given, total, *_others in found]
    assert given[0] == 1.0
    assert max(given[1:]) < 0.6

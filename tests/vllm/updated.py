"""Two versions of a model, and what an engine has and answers after it was given one of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from mxbench.demo import models
from tests.vllm import families, quantised
from tests.vllm.conftest import LLAMA
from tests.vllm.engines import EngineHost, Loaded

__all__ = [
    "OPTIONS",
    "TRANSFER",
    "Versions",
    "addresses",
    "as_loaded",
    "now",
    "report_of",
    "update",
    "versions_of",
]

OPTIONS: dict[str, dict[str, Any]] = {
    "classifier": {"runner": "pooling", "convert": "classify"},
    "minilm": {"runner": "pooling"},
}
"""Of engines, by the model's name here, where it needs some."""
TIED = {**LLAMA, "head_dim": 32, "tie_word_embeddings": True}
TRANSFER: dict[str, Any] = {"weight_transfer_config": {"backend": "mx"}}


class Versions(NamedTuple):
    """Folders of one model with two seeds: no tensor is equal."""

    one: Path
    two: Path


def versions_of(folder: Path, name: str) -> Versions:
    """Of a family, of a quantised Llama, of a model of the demo."""

    def generate(place: Path, seed: int) -> Path:
        match name:
            case "llama":
                return models.generate(place, "llama", LLAMA, seed=seed)
            case "qwen3":
                return models.generate(place, "qwen3", TIED, seed=seed)
            case "classifier":
                return families.classifier(place, seed=seed)
            case "minilm":
                return _minilm(place, seed)
        make = quantised.generate if name in quantised.QUANTISATIONS else families.generate
        return make(place, name, seed=seed)

    place = folder / "versions" / name
    return Versions(generate(place / "1", 1), generate(place / "2", 2))


def _minilm(folder: Path, seed: int) -> Path:
    """The real model, each of its weights a little larger or smaller."""
    import torch
    from safetensors.torch import load_file, save_file

    if (folder / "changed").exists():
        return folder
    models.minilm(folder)
    generator = torch.Generator().manual_seed(seed)
    for file in folder.glob("*.safetensors"):
        changed = {
            name: tensor * (1 + 0.1 * torch.randn(tensor.shape, generator=generator)).to(tensor.dtype)
            if tensor.is_floating_point()
            else tensor
            for name, tensor in load_file(file).items()
        }
        save_file(changed, file, metadata={"format": "pt"})
    (folder / "changed").touch()
    return folder


def now(host: EngineHost) -> dict[str, Any]:
    """What the kept engine answers, and its tensors' digests."""
    told = host.ask("answers")
    return {"answers": told["answers"], "digests": told["digests"]}


def as_loaded(host: EngineHost, model: Path, **options: Any) -> dict[str, Any]:
    """The same of an engine that vLLM's default loader loads."""
    host.load(model, "auto", keep=True, **options)
    told = now(host)
    host.ask("end")
    return told


def update(host: EngineHost, **info: Any) -> dict[str, Any]:
    """Without an error; the state of the first worker's model."""
    told = host.ask("update", info=info)
    assert told["error"] == ""
    state: dict[str, Any] = told["states"][0]["models"][0]
    assert state["ready"]
    return state


def addresses(host: EngineHost) -> Any:
    """Where the kept engine's parameters and buffers are."""
    return host.ask("addresses")["addresses"]


def report_of(loaded: Loaded) -> dict[str, Any]:
    """That of the engine's last update."""
    told: dict[str, Any] = json.loads(Path(f"{loaded.report_path}.update").read_text())
    return told

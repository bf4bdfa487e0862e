"""The rule of `mxcore.engine.weights` against what it is to find: what differs between two checkpoints is a weight.

The same model is loaded from checkpoints with other values. Each tensor and each number that then differs depends on
the checkpoint. The set of tensors must be the same for all of them, whatever the values.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mxbench.demo import models
from tests.vllm import families
from tests.vllm.engines import EngineHost

DECODER = families.FAMILIES["mixtral"].shape
FAMILIES = sorted({*families.FAMILIES, *families.SPECIAL, "llama"})


@pytest.fixture(scope="module")
def host(folder: Path, server: str) -> Iterator[EngineHost]:
    made = EngineHost("looking", folder, server)
    made.ask("look")
    made.ask("plain_linear", on=True)
    yield made
    made.close()


def checkpoint(folder: Path, family: str, seed: int) -> Path:
    if family == "llama":
        shape = {key: value for key, value in DECODER.items() if "expert" not in key}
        return models.generate(folder, "llama", shape, seed=seed)
    return families.generate(folder, family, seed=seed)


def of_ones(folder: Path, model: Path) -> Path:
    """A copy of a checkpoint in which each value is what norms, scales and the like are before loading."""
    import torch
    from safetensors.torch import load_file, save_file

    folder.mkdir(parents=True, exist_ok=True)
    for path in model.iterdir():
        if path.suffix == ".safetensors":
            ones = {name: torch.ones_like(tensor) for name, tensor in load_file(path).items()}
            save_file(ones, folder / path.name, metadata={"format": "pt"})
        else:
            (folder / path.name).write_bytes(path.read_bytes())
    return folder


def different(one: dict[str, Any], other: dict[str, Any]) -> set[str]:
    return {name for name in one.keys() | other.keys() if one.get(name) != other.get(name)}


@pytest.mark.parametrize("kind", ["raw", "processed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_depends_on_the_checkpoint_is_a_weight(host: EngineHost, folder: Path, family: str, kind: str) -> None:
    place = folder / "oracle" / family
    first = checkpoint(place / "first", family, 20)
    paths = [first, checkpoint(place / "second", family, 21), of_ones(place / "ones", first)]
    looks = []
    for path in paths:
        host.load(path, extra={"layout": kind})
        looks.append(host.ask("seen"))
        host.ask("leave")
    one, other, ones = looks
    assert one["weights"] == other["weights"] == ones["weights"]
    assert one["structure"] == other["structure"] == ones["structure"]
    assert one["tensors"].keys() == other["tensors"].keys()
    depends = different(one["tensors"], other["tensors"]) | different(one["tensors"], ones["tensors"])
    assert depends <= set(one["weights"])
    assert depends, "nothing was seen"
    numbers = different(one["numbers"], other["numbers"])
    assert numbers <= one["sent"].keys()


def test_nothing_of_raw_weights_stays_beside_processed_ones(host: EngineHost) -> None:
    """At most 64 MiB more than the model, repacked by vLLM's own function, which drops each raw parameter."""
    found = host.ask("repack")
    assert found["offered"] == found["model"]
    assert found["most"] <= found["model"] + (64 << 20)

"""A checkpoint that is not what it was: weights of the one are never taken for those of the other."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mxbench.demo import models
from mxserver.wire.calls import ServerClient
from tests.vllm.conftest import LLAMA
from tests.vllm.engines import ANSWER_SECONDS, EngineHost
from tests.vllm.replacing import replace

MISTRALS_NAMES = {
    "model.": "",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "embed_tokens": "tok_embeddings",
    "lm_head": "output",
}
OTHER_FILES = "has other weight files"


def write(file: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, file, metadata={"format": "pt"})


def one_norm(folder: Path) -> Callable[[int], None]:
    """A Llama, of which 256 bytes change."""
    model = models.generate(folder, "llama", LLAMA)
    name = "model.layers.1.input_layernorm.weight"
    [file] = [file for file in model.glob("*.safetensors") if name in load_file(file)]

    def change(seed: int) -> None:
        write(file, {**load_file(file), name: torch.full((128,), 0.5 * seed, dtype=torch.bfloat16)})

    return change


def consolidated(folder: Path) -> Callable[[int], None]:
    """A Mistral with its own file beside shards and their index, as it is published; that file changes."""
    models.generate(folder, "mistral", {**LLAMA, "num_hidden_layers": 6, "sliding_window": None})
    assert (folder / "model.safetensors.index.json").exists()
    shards = [load_file(file) for file in folder.glob("*.safetensors")]

    def change(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        tensors = {}
        for name, tensor in (pair for shard in shards for pair in shard.items()):
            for theirs, mistrals in MISTRALS_NAMES.items():
                name = name.replace(theirs, mistrals)
            values = torch.randn(tensor.shape, generator=generator) * 0.15
            tensors[name] = (1 + values if "norm" in name else values).to(torch.bfloat16)
        write(folder / "consolidated.safetensors", tensors)

    return change


def projector(folder: Path) -> Callable[[int], None]:
    """An embedding model of sentence-transformers with a dense layer in a folder of its own, which changes."""
    models.minilm(folder)
    modules = [module for module in json.loads((folder / "modules.json").read_text()) if "Norm" not in module["type"]]
    dense = {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"}
    (folder / "modules.json").write_text(json.dumps([*modules, dense]))
    (folder / "2_Dense").mkdir()
    activation = "torch.nn.modules.activation.Tanh"
    shape = {"in_features": 384, "out_features": 64, "bias": True, "activation_function": activation}
    (folder / "2_Dense" / "config.json").write_text(json.dumps(shape))

    def change(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        weight, bias = (torch.randn(shape, generator=generator) * 0.1 for shape in ((64, 384), (64,)))
        write(folder / "2_Dense" / "model.safetensors", {"linear.weight": weight, "linear.bias": bias})

    return change


@pytest.mark.parametrize(
    ("part", "options"),
    [(one_norm, {}), (consolidated, {}), (projector, {"runner": "pooling"})],
    ids=["one norm", "consolidated", "2_Dense"],
)
def test_one_part_changed_is_another_checkpoint(
    part: Callable[[Path], Callable[[int], None]],
    options: dict[str, Any],
    source: EngineHost,
    target: EngineHost,
    tmp_path: Path,
) -> None:
    model = tmp_path / "model"
    change = part(model)
    change(1)
    first = source.load(model, **options)
    assert first.report["serving"]
    change(2)
    second = target.load(model, **options)

    assert second.report["path"] == "storage"
    reason = next(step["reason"] for step in second.report["paths"] if step["rung"] == "p2p")
    assert f"worker {first.report['worker_id']} {OTHER_FILES}" in reason
    assert second.answers == target.load(model, "auto", **options).answers != first.answers


@pytest.fixture
def two(tmp_path: Path, target: EngineHost) -> tuple[Path, Path, Path, list[Any]]:
    """A model, the two checkpoints that are put under its path (the first is), and what both answer."""
    old, new = (models.generate(tmp_path / f"v{seed}", "llama", LLAMA, seed=seed) for seed in (1, 2))
    model = shutil.copytree(old, tmp_path / "model")
    return model, old, new, [target.load(version, "auto").answers for version in (old, new)]


@contextmanager
def turn_of_another(server: str, source_id: str) -> Iterator[None]:
    """A worker that reads storage for all, and is not done before this ends."""
    over = threading.Event()
    with ServerClient(server) as client:
        epoch = client.take_storage_turn(source_id, 0, "slow").epoch
        assert epoch

        def hold() -> None:
            while not over.wait(0.5):
                client.take_storage_turn(source_id, 0, "slow", epoch)

        holding = threading.Thread(target=hold)
        holding.start()
        try:
            yield
        finally:
            over.set()
            holding.join()
            client.end_storage_turn(source_id, 0, "slow", epoch, shared=False)


def test_replaced_while_waiting_and_put_back(
    server: str, source: EngineHost, target: EngineHost, two: tuple[Path, Path, Path, list[Any]]
) -> None:
    """Finding W3: the second checkpoint was offered under the first one's name, and taken after the roll-back."""
    model, old, new, (old_answers, new_answers) = two
    source_id = source.load(model).report["source_id"]
    source.ask("leave")
    before = target.log.stat().st_size
    with ThreadPoolExecutor(1) as pool:
        with turn_of_another(server, source_id):
            waiting = pool.submit(target.load, model)
            deadline = time.monotonic() + ANSWER_SECONDS
            while b"reads the weights from storage: waiting" not in target.log.read_bytes()[before:]:
                assert time.monotonic() < deadline
                assert not waiting.done(), waiting.result()
                time.sleep(0.05)
            replace(model, new)
        loaded = waiting.result()
    assert (loaded.report["path"], loaded.answers) == ("storage", new_answers)
    assert loaded.report["source_id"] != source_id
    replace(model, old)
    after = source.load(model)
    assert (after.report["path"], after.answers) == ("storage", old_answers)


def test_replaced_when_it_was_read_is_not_offered(
    source: EngineHost, target: EngineHost, two: tuple[Path, Path, Path, list[Any]]
) -> None:
    model, _, new, (old_answers, new_answers) = two
    source.ask("call", function="tests.vllm.replacing:when_read", arguments={"model": str(model), "other": str(new)})
    first = source.load(model)
    assert first.answers == old_answers
    assert not first.report["serving"]
    assert "changed" in " ".join(first.report["fallbacks"])
    second = target.load(model)
    assert (second.report["path"], second.answers) == ("storage", new_answers)

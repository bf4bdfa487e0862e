"""vLLM's own parallel layers, two ranks: lazy tensors leave in them what ordinary ones do, and each reads its part."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mxbench.demo.processes import ENGINE_ENVIRONMENT, clean_environment

pytestmark = pytest.mark.vllm

ROOT = Path(__file__).resolve().parents[3]
HIDDEN, HEADS, KV_HEADS, HEAD = 64, 8, 2, 16


def written() -> dict[str, torch.Tensor]:
    torch.manual_seed(11)
    size = HEADS * HEAD
    return {
        "q": torch.randn(size, HIDDEN).bfloat16(),
        "k": torch.randn(KV_HEADS * HEAD, HIDDEN).bfloat16(),
        "v": torch.randn(KV_HEADS * HEAD, HIDDEN).bfloat16(),
        "gate": torch.randn(128, HIDDEN).bfloat16(),
        "up": torch.randn(128, HIDDEN).bfloat16(),
        "down": torch.randn(HIDDEN, 128).bfloat16(),
        "vocabulary": torch.randn(200, HIDDEN).bfloat16(),
    }


RANK = """
import json, sys
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from mxcore.storage.checkpoint import open_checkpoint
from mxcore.storage.load import load
from mxcore.engine.lazy_tensors import LazyTensor, lazy_weights

rank, rendezvous, file = int(sys.argv[1]), sys.argv[2], sys.argv[3]
checkpoint = open_checkpoint(file)
whole = {name: torch.zeros(info.shape, dtype=torch.bfloat16) for name, info in checkpoint.items()}
load(checkpoint, whole)
answers = {}
with set_current_vllm_config(VllmConfig()):
    init_distributed_environment(2, rank, f"file://{rendezvous}", rank, "gloo")
    initialize_model_parallel(2)
    torch.set_default_dtype(torch.bfloat16)

    def layers():
        return {
            "qkv": QKVParallelLinear(64, 16, 8, 2, bias=False, prefix="qkv"),
            "gate_up": MergedColumnParallelLinear(64, [128, 128], bias=False, prefix="gate_up"),
            "down": RowParallelLinear(128, 64, bias=False, prefix="down"),
            "vocabulary": VocabParallelEmbedding(200, 64, prefix="vocabulary"),
        }

    def fill(layer, name, tensor):
        shard = {"q": ("qkv", "q"), "k": ("qkv", "k"), "v": ("qkv", "v"), "gate": ("gate_up", 0), "up": ("gate_up", 1)}
        where, shard_id = shard.get(name, (name, None))
        weight = layer[where].weight
        weight.weight_loader(weight, tensor, *([] if shard_id is None else [shard_id]))

    ordinary, lazily = layers(), layers()
    for name, tensor in lazy_weights(checkpoint, lazy_least_bytes=100, mode="buffered"):
        fill(ordinary, name, whole[name])
        assert isinstance(tensor, LazyTensor)
        before = tensor._source.read_bytes
        fill(lazily, name, tensor)
        answers[name] = [tensor._source.read_bytes - before, tensor.has_been_read]
    for name in ordinary:
        assert torch.equal(ordinary[name].weight, lazily[name].weight), name
        answers[f"{name} differs by rank"] = int(ordinary[name].weight.float().sum() * 1000)
print(json.dumps(answers))
"""


def test_each_rank_reads_its_part(tmp_path: Path) -> None:
    file = tmp_path / "layers.safetensors"
    tensors = written()
    save_file(tensors, file)
    (tmp_path / "rank.py").write_text(RANK)
    ours = {"PYTHONPATH": str(ROOT), "VLLM_DIST_IDENT": tmp_path.name}
    environment = {**clean_environment(), **ENGINE_ENVIRONMENT, **ours}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(tmp_path / "rank.py"), str(rank), str(tmp_path / "rendezvous"), str(file)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=300) for process in ranks]
    assert all(process.returncode == 0 for process in ranks), said[0][1][-3000:] + said[1][1][-3000:]
    first, second = (json.loads(out.splitlines()[-1]) for out, _ in said)
    for name, tensor in tensors.items():
        assert first[name][0] + second[name][0] == tensor.nbytes, name
        assert not first[name][1], f"{name} became an ordinary tensor"
        if name != "vocabulary":  # whose padding is the second rank's
            assert first[name] == second[name]
    assert first["down differs by rank"] != second["down differs by rank"]

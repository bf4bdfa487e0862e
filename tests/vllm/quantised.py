"""Small quantised checkpoints, written here in the forms that vLLM reads: what stands beside `families`.

`compressed_tensors`: int8 weights with a scale a row, activations quantised as they come, around a zero point of their
own (which no AMX kernel takes: one path on every CPU). `gptq` and `awq`: four bits, a scale and a zero point a group.
The values are those of a generated Llama, rounded; nothing is calibrated.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from mxbench.demo import models
from tests.vllm.conftest import LLAMA

GROUP = 32  # weights of a row that share a scale
_NIBBLES = torch.arange(0, 32, 4, dtype=torch.int32)
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which of eight columns is the n-th nibble of an AWQ word


def generate(folder: Path, name: str, *, seed: int = 20) -> Path:
    """Writes the checkpoint of a Llama quantised as `name` says, a key of `QUANTISATIONS`; returns `folder`."""
    if (folder / "ready").exists():
        return folder
    quantise, config = QUANTISATIONS[name]
    plain = models.generate(folder.with_name(f"{folder.name}.plain"), "llama", LLAMA, seed=seed)
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(plain, folder, ignore=shutil.ignore_patterns("*.safetensors*", "ready"))
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(plain.glob("*.safetensors")):
        for key, tensor in load_file(file).items():
            layer = key.removesuffix(".weight")
            if layer.endswith("_proj"):
                tensors.update((f"{layer}.{part}", value) for part, value in quantise(tensor.float()).items())
            else:
                tensors[key] = tensor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": config}))
    (folder / "ready").touch()
    return folder


def _int8(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    scale = weight.abs().amax(dim=1, keepdim=True) / 127
    return {"weight": torch.round(weight / scale).to(torch.int8), "weight_scale": scale.to(torch.bfloat16)}


def _four_bits(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of a weight of out rows and in columns: in × out values of 0 to 15 around 8, and groups × out scales."""
    groups = weight.t().reshape(-1, GROUP, weight.shape[0])
    scale = groups.abs().amax(dim=1, keepdim=True) / 7
    values = torch.round(groups / scale).to(torch.int32) + 8
    return values.reshape(weight.shape[1], -1), scale.squeeze(1)


def _packed(values: torch.Tensor, order: tuple[int, ...] = tuple(range(8))) -> torch.Tensor:
    """Eight neighbouring columns of small int32 values in one word."""
    words = values.reshape(values.shape[0], -1, 8)[:, :, list(order)]
    return (words << _NIBBLES).sum(dim=2).to(torch.int32)


def _gptq(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    values, scale = _four_bits(weight)
    return {
        "qweight": _packed(values.t()).t().contiguous(),
        "qzeros": _packed(torch.full(scale.shape, 7, dtype=torch.int32)),  # stored as one less
        "scales": scale.to(torch.bfloat16),
        "g_idx": torch.arange(weight.shape[1], dtype=torch.int32) // GROUP,
    }


def _awq(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    values, scale = _four_bits(weight)
    return {
        "qweight": _packed(values, _AWQ_ORDER),
        "qzeros": _packed(torch.full(scale.shape, 8, dtype=torch.int32), _AWQ_ORDER),
        "scales": scale.to(torch.bfloat16),
    }


_INT8_SCHEME = {
    "targets": ["Linear"],
    "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False},
    "input_activations": {"num_bits": 8, "type": "int", "symmetric": False, "strategy": "token", "dynamic": True},
}

QUANTISATIONS: dict[str, tuple[Callable[[torch.Tensor], dict[str, torch.Tensor]], dict[str, Any]]] = {
    "compressed_tensors": (
        _int8,
        {
            "quant_method": "compressed-tensors",
            "format": "int-quantized",
            "config_groups": {"group_0": _INT8_SCHEME},
            "ignore": ["lm_head"],
            "quantization_status": "compressed",
        },
    ),
    "gptq": (_gptq, {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True}),
    "awq": (_awq, {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}),
}

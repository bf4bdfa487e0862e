"""Experts that vLLM's own `replace_parameter` repacks, and how much memory that takes."""

from __future__ import annotations

import gc
from pathlib import Path

import torch
from torch import nn
from vllm.model_executor.utils import replace_parameter, set_weight_attrs

from mxcore.engine.weights import Built, MarkUninitialised, Weights

LAYERS = 24
LAYER_BYTES = 8 << 20


class Experts(nn.Module):
    """One packed weight with attributes, as compressed-tensors' and AWQ's have them."""

    def __init__(self) -> None:
        super().__init__()
        self.w13_weight_packed = nn.Parameter(torch.empty(LAYER_BYTES // 4, dtype=torch.int32), requires_grad=False)
        set_weight_attrs(self.w13_weight_packed, {"is_transposed": False, "quant_method": "group", "scale": 0.5})


def measure() -> dict[str, int]:
    """Bytes of the model, of what is offered of it, and the most that this process held beside what it held before."""
    gc.collect()
    before = _forget_most_bytes()
    cpu = torch.device("cpu")
    with MarkUninitialised():
        model = nn.ModuleList([Experts() for _ in range(LAYERS)])
    weights, built = Weights("processed", cpu), Built(model, cpu)
    for layer in model:
        layer.w13_weight_packed.data.fill_(7)
    weights.loaded(model, built)
    for layer in model:
        packed = layer.w13_weight_packed.data
        replace_parameter(layer, "w13_weight_packed", packed.view(2, -1).t().contiguous())
    weights.processed(model)
    offered = 0 if weights.layout is None else weights.layout.total_bytes
    return {"model": LAYERS * LAYER_BYTES, "offered": offered, "most": _most_bytes() - before}


def _most_bytes() -> int:
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) << 10


def _forget_most_bytes() -> int:
    Path("/proc/self/clear_refs").write_text("5")
    return _most_bytes()

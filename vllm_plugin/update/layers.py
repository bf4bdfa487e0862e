"""vLLM's processing of weights after loading, layer by layer, for modules that run already.

What vLLM does for a new model (`process_weights_after_loading`) and in its layerwise reload, with four differences,
each of which its reload lacks (0.32): experts are packed anew on a CPU; what a kernel's handler points at is held;
tied layers are processed like any other; tensors on a parameter come with it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from vllm.config import ModelConfig
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.platforms import current_platform

from mxcore.engine import Staged

__all__ = ["process"]

_DONE = "_already_called_process_weights_after_loading"


def process(model: nn.Module, staged: Staged, model_config: ModelConfig, device: torch.device) -> object:
    """Makes of staged raw weights what the engine computes with, and writes it where that was. Raises what vLLM raises.

    In the order of a new model: all layers, then attention, then the model itself. The result has to be held until the
    next time: oneDNN's handlers point at it (the values are in the model as well).
    """
    attention: list[Any] = []
    held: list[object] = []
    holds = current_platform.is_cpu() and model_config.quantization is not None
    for layer in staged.modules:
        vars(layer).pop(_DONE, None)
        method = getattr(layer, "quant_method", None)
        getattr(method, "__dict__", {}).pop(_DONE, None)
        _to_device(layer, device)
        if isinstance(method, QuantizeMethodBase):
            if current_platform.is_cpu() and getattr(method, "moe_kernel", None) is not None:
                method.moe_kernel = None  # vLLM's CPU experts are packed where there is none yet
            method.process_weights_after_loading(layer)
            if hasattr(layer, "update_param_tp_status"):
                layer.update_param_tp_status()
        written = staged.commit(layer, makes_more=_is_attention(layer))  # MLA's W_UV and W_UK_T, below
        if holds and isinstance(method, QuantizeMethodBase):
            held.append(written)
        if _is_attention(layer):
            attention.append(layer)
    for layer in attention:
        vars(layer).pop(_DONE, None)
        layer.process_weights_after_loading(model_config.dtype)
    if hasattr(model, "process_weights_after_loading"):
        model.process_weights_after_loading()
    return held


def _is_attention(layer: Any) -> bool:
    from vllm.model_executor.layers.attention import is_deferred_attention_layer

    return bool(is_deferred_attention_layer(layer))


def _to_device(layer: nn.Module, device: torch.device) -> None:
    """What was staged in host memory goes where kernels want it, with its class and attributes."""
    if device.type == "cpu":
        return
    for named in (layer._parameters, layer._buffers):
        for name, tensor in named.items():
            if tensor is not None and tensor.device.type == "cpu":
                moved: Any = tensor.data.to(device)
                moved.__class__ = tensor.__class__
                moved.__dict__.update(vars(tensor))
                named[name] = moved

"""GPTQ in the form of NVIDIA's Marlin, by vLLM's own classes, from one layer to another; run in a process with vLLM.

The kernel that repacks the weights is CUDA's. Here a transposition of the same words into the same shape stands for it:
the bytes are moved, not used.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from vllm import _custom_ops as ops
from vllm.model_executor import parameter
from vllm.model_executor.kernels.linear.mixed_precision.marlin import MarlinLinearKernel
from vllm.model_executor.layers.quantization import auto_gptq

from mxcore.engine.weights import Built, MarkUninitialised, Weights
from mxcore.engine.weights.structure import structure_of
from tests.engine.in_memory import received_from

CPU = torch.device("cpu")
ROWS, COLUMNS, GROUP = 256, 128, 128


def repack(words: torch.Tensor, size_k: int, size_n: int, num_bits: int, **_: Any) -> torch.Tensor:
    """The shape of CUDA's `gptq_marlin_repack`, and all words."""
    return words.t().reshape(size_k // 16, size_n * 16 // (32 // num_bits)).contiguous()


def made() -> torch.nn.Module:
    """A model of one quantised layer, its memory uninitialised."""
    config = auto_gptq.AutoGPTQConfig(
        weight_bits=4,
        group_size=GROUP,
        desc_act=False,
        is_sym=True,
        lm_head_quantized=False,
        dynamic={},
        full_config={},
    )
    layer = torch.nn.Module()
    layer.quant_method = auto_gptq.AutoGPTQLinearMethod(config)
    with MarkUninitialised(), CPU:
        layer.quant_method.create_weights(
            layer, ROWS, [COLUMNS], ROWS, COLUMNS, torch.bfloat16, weight_loader=lambda *_: None
        )
    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList([layer])
    return model


def fill(model: torch.nn.Module, seed: int) -> None:
    """What a checkpoint would write."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in model.parameters():
        if tensor.dtype == torch.int32:
            tensor.data.copy_(torch.randint(2**31, tensor.shape, generator=generator, dtype=torch.int32))
        else:
            tensor.data.copy_(torch.rand(tensor.shape, generator=generator))


def exchange() -> dict[str, Any]:
    """The manifest of one worker's processed layer, and whether another's has the same bytes after taking it."""
    with (
        mock.patch.object(auto_gptq, "verify_marlin_supported"),
        mock.patch.object(auto_gptq, "choose_mp_linear_kernel", return_value=MarlinLinearKernel),
        mock.patch.object(MarlinLinearKernel, "can_implement", classmethod(lambda *_: (True, None))),
        mock.patch.object(ops, "gptq_marlin_repack", repack),
        mock.patch.object(parameter, "get_tensor_model_parallel_rank", return_value=0),
        mock.patch.object(parameter, "get_tensor_model_parallel_world_size", return_value=1),
    ):
        source, target = made(), made()
        offered, taken = Weights("processed", CPU), Weights("processed", CPU)
        built = Built(source, CPU)
        fill(source, 1)
        offered.loaded(source, built)
        source.layers[0].quant_method.process_weights_after_loading(source.layers[0])
        offered.processed(source)
        built = Built(target, CPU, copies=True)
        fill(target, 2)  # placeholders
        taken.loaded(target, built)
        target.layers[0].quant_method.process_weights_after_loading(target.layers[0])
        before = {name: tensor.clone() for name, tensor in target.named_parameters()}
        taken.processed(target, received_from(offered))
    ours, theirs = dict(target.named_parameters()), dict(source.named_parameters())
    assert offered.layout is not None
    return {
        "moved": sorted(tensor.name for tensor in offered.layout.tensors),
        "empty": sorted(name for name, tensor in theirs.items() if not tensor.numel()),
        "equal": [name for name in theirs if torch.equal(theirs[name], ours[name])],
        "changed": [name for name in ours if not torch.equal(before[name], ours[name])],
        "structure": [row for row in structure_of(offered.scalars) if "Marlin" in row],
    }

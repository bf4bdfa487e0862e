"""How an engine is started: what vLLM needs to run without its compiled kernels, on a GPU and on the CPU build."""

from __future__ import annotations

from typing import Any

from mxbench.demo.processes import ENGINE_ENVIRONMENT

COMMON: dict[str, Any] = {
    "enforce_eager": True,
    "max_model_len": 128,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 256,
    "seed": 0,
    "kv_cache_memory_bytes": 1 << 26,
    "disable_log_stats": True,
}
NO_KERNELS: dict[str, Any] = {
    "attention_config": {"backend": "TRITON_ATTN"},
    "compilation_config": {"custom_ops": ["none"]},
    # On CUDA vLLM asks its compiled operators first, and takes them for there.
    "kernel_config": {"ir_op_priority": {"rms_norm": ["native"], "fused_add_rms_norm": ["native"]}},
    "gpu_memory_utilization": 0.2,  # of the device, which several engines share
}
GPU_ENVIRONMENT = {
    # Runner V2 wants a compiled operator (get_cuda_view_from_cpu_tensor), and is the default wherever Triton works.
    "VLLM_USE_V2_MODEL_RUNNER": "0",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    # A machine without a network may have no route and no name of its own.
    "VLLM_HOST_IP": "127.0.0.1",
    "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_SOCKET_IFNAME": "lo",
}


def options(*, gpu: bool) -> dict[str, Any]:
    """Of an engine on the GPU, or on the CPU build."""
    return {**COMMON, **(NO_KERNELS if gpu else {})}


def environment(*, gpu: bool) -> dict[str, str]:
    """Of an engine's process."""
    return {**ENGINE_ENVIRONMENT, **(GPU_ENVIRONMENT if gpu else {})}

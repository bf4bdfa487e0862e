"""Triton compiles the kernels that the kit's engines run, to machine code for a Hopper GPU that is not there."""

from __future__ import annotations

from typing import Any

ARCHITECTURE = 90
TOKENS, HEADS, KV_HEADS, HEAD_SIZE, BLOCK, SEGMENTS = 7, 16, 8, 64, 16, 16


class FakedDriver:
    """What Triton asks of a driver before it compiles."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", ARCHITECTURE, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: Any = None) -> int:
        return 0


def compile_kernels() -> dict[str, int]:
    """Kernel → bytes of its cubin: what vLLM's functions would launch for a prompt, one more token, and the cache."""
    import torch
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    driver.set_active(FakedDriver())
    torch.cuda.get_device_capability = lambda *_: (ARCHITECTURE // 10, ARCHITECTURE % 10)
    sizes: dict[str, int] = {}
    launch = JITFunction.run

    def compile_alone(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        made = launch(self, *arguments, grid=grid, warmup=True, **options)
        sizes[made.metadata.name] = len(made.asm["cubin"])
        return made

    JITFunction.run = compile_alone
    try:
        _attention(torch)
        _slots(torch)
    finally:
        JITFunction.run = launch
    return sizes


def _attention(torch: Any) -> None:
    from vllm.v1.attention.ops.triton_reshape_and_cache_flash import triton_reshape_and_cache_flash
    from vllm.v1.attention.ops.triton_unified_attention import unified_attention

    def zeros(*shape: int) -> Any:
        return torch.zeros(*shape, dtype=torch.bfloat16)

    keys, values = (zeros(4, BLOCK, KV_HEADS, HEAD_SIZE) for _ in range(2))
    query, scale = zeros(TOKENS, HEADS, HEAD_SIZE), torch.ones(1)
    new = [zeros(TOKENS, KV_HEADS, HEAD_SIZE) for _ in range(2)]
    triton_reshape_and_cache_flash(*new, keys, values, torch.arange(TOKENS), "auto", scale, scale)

    def attend(tokens: int, **more: Any) -> None:
        count = torch.tensor([tokens], dtype=torch.int32)
        begins, blocks = torch.tensor([0, tokens], dtype=torch.int32), torch.zeros(1, 8, dtype=torch.int32)
        given = {"q": query[:tokens], "k": keys, "v": values, "out": torch.zeros_like(query[:tokens])}
        sizes = {"max_seqlen_q": tokens, "max_seqlen_k": tokens, "seqused_k": count, "cu_seqlens_q": begins}
        form = {"softmax_scale": 0.1, "causal": True, "window_size": (-1, -1), "softcap": 0.0, "block_table": blocks}
        unified_attention(**given, **sizes, **form, q_descale=None, k_descale=scale, v_descale=scale, **more)

    attend(TOKENS)
    attend(
        1,
        seq_threshold_3D=8,
        num_par_softmax_segments=SEGMENTS,
        softmax_segm_output=torch.zeros(8, HEADS, SEGMENTS, HEAD_SIZE),
        softmax_segm_max=torch.zeros(8, HEADS, SEGMENTS),
        softmax_segm_expsum=torch.zeros(8, HEADS, SEGMENTS),
    )


def _slots(torch: Any) -> None:
    from vllm.v1.worker.block_table import ComputeSlotMappingKernel

    def zeros(*shape: int) -> Any:
        return torch.zeros(*shape, dtype=torch.int32)

    places = torch.zeros(BLOCK, dtype=torch.int64)
    ComputeSlotMappingKernel.kernel[(2,)](
        *(TOKENS, BLOCK, zeros(2), places, zeros(4, 8), 8, torch.zeros_like(places)),
        KV_CACHE_BLOCK_SIZE=BLOCK,
        TOTAL_CP_WORLD_SIZE=1,
        TOTAL_CP_RANK=0,
        CP_KV_CACHE_INTERLEAVE_SIZE=1,
        PAD_ID=-1,
        BLOCK_SIZE=1024,
    )

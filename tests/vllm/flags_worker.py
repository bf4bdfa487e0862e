"""Workers of vLLM whose model is built under options that no engine of vLLM's CPU build runs with, here at least.

Decode context parallelism over two ranks, two batches at once, a KV cache in fp8 (which needs AVX-512). The options are
there while the model is built, where vLLM's own classes take them over, and gone before the engine looks at them.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest import mock

from vllm.distributed import parallel_state
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl
from vllm.v1.worker.cp_utils import check_attention_cp_compatibility

from tests.vllm.parallel_worker import ParallelWorker

FLAGS = {"decode_context_parallel_size": 2, "enable_dbo": True}


class FlagsWorker(ParallelWorker):
    """Loads under FLAGS."""

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        with (
            mock.patch.multiple(self.vllm_config.parallel_config, **FLAGS),
            mock.patch.object(parallel_state, "_DCP", SimpleNamespace(world_size=2, rank_in_group=0)),
            mock.patch.object(CPUAttentionBackendImpl, "can_return_lse_for_decode", new=True),
        ):
            super().load_model(*args, **kwargs)
            check_attention_cp_compatibility(self.vllm_config)  # as the model runner does; raises AssertionError

    def flags(self) -> list[Any]:
        """Of attention layers whether they give their log-sum-exp, of experts whether two batches are in flight; and
        the weights' digest.
        """
        modules = list(self.model_runner.get_model().modules())
        returns = {module.impl.need_to_return_lse_for_decode for module in modules if hasattr(module, "impl")}
        two = {found for module in modules if (found := getattr(module, "enable_dbo", None)) is not None}
        return [sorted(returns), sorted(two), self.weights_digest()]


class ExpertsWorker(ParallelWorker):
    """Under the engine's own options; says whether its experts are to be used with LoRA."""

    def lora_flags(self) -> list[Any]:
        """Of experts whether LoRA is on, and the weights' digest."""
        modules = self.model_runner.get_model().modules()
        found = {module.moe_config.is_lora_enabled for module in modules if hasattr(module, "moe_config")}
        return [sorted(found), self.weights_digest()]


class CacheWorker(ParallelWorker):
    """Loads as for a KV cache in fp8. `caches` says what attention layers make of it; they are as without after it."""

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        with mock.patch.object(self.vllm_config.cache_config, "cache_dtype", "fp8"):
            super().load_model(*args, **kwargs)
        layers = [module for module in self.model_runner.get_model().modules() if hasattr(module, "kv_cache_dtype")]
        self._caches = sorted({layer.kv_cache_dtype for layer in layers})
        for layer in layers:
            layer.kv_cache_dtype, layer.kv_cache_torch_dtype = "auto", layer.dtype
            layer.impl.kv_cache_dtype, layer.impl.is_fp8_kv_cache = "auto", False

    def caches(self) -> list[Any]:
        """The types of caches under which the model was built, and the weights' digest."""
        return [self._caches, self.weights_digest()]

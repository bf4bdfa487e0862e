"""A worker of vLLM whose model is built as for decode context parallelism over two ranks and two batches at once.

vLLM's CPU build has neither, and one rank has no group of two. So the flags are there while the model is built, where
vLLM's own classes take them over, and gone before the engine looks at them.
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
    """Loads under FLAGS. `flags` says what the model has of them after loading."""

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        parallel = self.vllm_config.parallel_config
        with (
            mock.patch.multiple(parallel, **FLAGS),
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

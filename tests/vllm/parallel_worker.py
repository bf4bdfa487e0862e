"""vLLM's CPU worker with what its CPU build (0.32) lacks of pipeline and expert parallelism, to run them for real.

A later stage of a pipeline finds no tensors to receive into: the run that makes them is left out on a CPU. And the
kernel for experts is given the numbers that all experts of the model have, whichever of them this rank holds, and
reads beyond its weights.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from vllm.distributed import get_pp_group
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
from vllm.v1.worker.cpu_worker import CPUWorker

from mxcore.digest import xxh3_64

_apply = CPUUnquantizedExperts.apply
_parameters = inspect.signature(_apply)


def _apply_local(*args: Any, **kwargs: Any) -> None:
    """As the kernel, with experts of other ranks at weight 0."""
    given = _parameters.bind(*args, **kwargs).arguments
    if (expert_map := given["expert_map"]) is not None:
        local = expert_map[given["topk_ids"].long()]
        given["topk_weights"] = torch.where(local < 0, 0, given["topk_weights"])
        given["topk_ids"] = local.clamp(min=0).to(given["topk_ids"].dtype)
    _apply(**given)


CPUUnquantizedExperts.apply = _apply_local


class ParallelWorker(CPUWorker):
    """The platform's worker for stages and experts."""

    def compile_or_warm_up_model(self) -> Any:
        runner = self.model_runner
        if not get_pp_group().is_first_rank and runner.intermediate_tensors is None:
            runner.intermediate_tensors = runner.model.make_empty_intermediate_tensors(
                batch_size=runner.max_num_tokens, dtype=runner.model_config.dtype, device=runner.device
            )
        return super().compile_or_warm_up_model()

    def weights_digest(self) -> str:
        """One digest of all parameters, names and bytes."""
        model: nn.Module = self.model_runner.get_model()
        digests = {
            name: xxh3_64(parameter.detach().contiguous().view(-1).view(torch.uint8).numpy())
            for name, parameter in sorted(model.named_parameters())
            if parameter.numel()
        }
        return f"{xxh3_64(repr(digests).encode()):016x}"

"""The platform's worker with expert load balancing, which vLLM has for GPUs alone: its parts that need none."""

from __future__ import annotations

from typing import Any

import torch
from vllm.distributed.eplb.eplb_state import EplbState

from mxcore.engine import serving
from vllm_plugin import compat


class BalancingWorker(compat.platform_worker()):  # type: ignore[misc]  # which one is known only here
    """For `EngineHost.load(ask="move_experts")`. Its layers are balanced ones; it computes no tokens."""

    def init_device(self) -> None:
        """On a CPU a configuration with balancing is refused when it is made, so it is switched on here."""
        parallel = self.vllm_config.parallel_config
        parallel.enable_eplb, parallel.eplb_config.communicator = True, "torch_gloo"
        super().init_device()

    def move_experts(self) -> dict[str, Any]:
        """vLLM's own state of balancing decides on other places. Offers before and after, and what stopped vLLM.

        In the mode in which a thread would move them later: the other one measures time with the device's events.
        """
        state = EplbState(self.vllm_config.parallel_config, torch.device("cpu"))
        state.add_model(self.model_runner.model, self.vllm_config.model_config)
        state.is_async = True
        before, stopped = len(serving._offers), ""
        try:
            state.rearrange()
        except Exception as error:  # noqa: BLE001 - the test looks at it
            stopped = f"{type(error).__name__}: {error}"
        return {"before": before, "after": len(serving._offers), "stopped": stopped}

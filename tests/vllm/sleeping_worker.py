"""vLLM's CPU worker with a sleep that takes the weights' memory away, as on an accelerator; the CPU's own leaves it."""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.worker.cpu_worker import CPUWorker


class SleepingWorker(CPUWorker):
    """Level 1 keeps a copy elsewhere, level 2 keeps none; the memory itself is overwritten with ones bits."""

    _elsewhere: list[torch.Tensor] | None = None

    def _weights(self) -> list[torch.Tensor]:
        parameters = self.model_runner.get_model().parameters()
        return [parameter.detach().view(torch.uint8) for parameter in parameters if parameter.numel()]

    def sleep(self, level: int = 1) -> None:
        self._elsewhere = [weights.clone() for weights in self._weights()] if level == 1 else None
        for weights in self._weights():
            weights.fill_(0xFF)

    def wake_up(self, tags: Any = None) -> None:
        if self._elsewhere is not None and (tags is None or "weights" in tags):
            for weights, before in zip(self._weights(), self._elsewhere, strict=True):
                weights.copy_(before)
            self._elsewhere = None

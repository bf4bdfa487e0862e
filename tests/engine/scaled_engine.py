"""A small engine whose model takes other weights while it runs; processing and requests write to many places of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from mxcore.engine import Fill, Replacement, Staged, find_checkpoint
from mxcore.exchange import PublishedVersion
from tests.engine.plain_engine import PlainEngine, answer, write_checkpoint

__all__ = ["ONE_MORE", "SIZE", "ScaledEngine", "fresh", "scaled"]

SIZE = 64
ONE_MORE = 0.25  # a scale with which processing makes one more tensor


class Scaled(nn.Module):
    """A matrix, and a scale that a checkpoint may have: what processing makes of it lies in a number and two buffers.

    What requests write is no weight: a cache, a count, a buffer that nobody gave a value, a number, a flag.
    """

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(SIZE, SIZE), requires_grad=False)
        self.scale = nn.Parameter(torch.ones(()), requires_grad=False)
        self.register_buffer("limit", torch.ones(()))
        self.register_buffer("cap", torch.ones(()), persistent=False)
        self.register_buffer("requests", torch.zeros(()), persistent=False)
        self.register_buffer("hidden", torch.empty(SIZE), persistent=False)
        self.cache = torch.tensor([])
        self.last_float = 0.0
        self.has_run = False
        self._scale_float = 1.0

    def process(self) -> None:
        if float(self.scale) != 1.0:
            self._scale_float = float(self.scale)
            self.limit.fill_(float(self.scale))
            self.cap.fill_(float(self.scale))
        if float(self.scale) == ONE_MORE:
            self.register_buffer("offset", torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.requests += 1
        self.has_run = True
        self.hidden.copy_(x)
        self.last_float = 1.0 + float(self.requests)
        if not self.cache.numel():
            self.cache = torch.zeros(4 * SIZE)
        self.cache[: x.numel()] = x
        return torch.tanh(x @ self.weight * self._scale_float) * self.limit * self.cap


class ScaledEngine(PlainEngine):
    """With `replacement`, an engine whose model runs. `breaks`: processing fails after its first layer, that often."""

    def __init__(
        self,
        folder: Path,
        replacement: Replacement | None = None,
        breaks: list[int] | None = None,
        options: Mapping[str, Any] | None = None,
        *,
        instance: str = "plain",
        processed_weights_move: bool = False,
    ) -> None:
        super().__init__(folder, options or {}, size=SIZE, processed_weights_move=processed_weights_move)
        self.instance = instance
        self.replacement = replacement
        self.published: PublishedVersion | None = None
        self.breaks = breaks if breaks is not None else [0]

    def building_state(self) -> Callable[[], None]:
        return self.replacement.abandon if self.replacement else super().building_state()

    def build(self, fill: Fill) -> nn.Module:
        if self.replacement is not None:
            return self.replacement.build(fill, self._process)
        model = nn.Sequential(Scaled(), Scaled(), Scaled())
        fill(model)
        for layer in model:
            layer.process()
        return model.eval()

    def _process(self, staged: Staged) -> None:
        for place, module in enumerate(staged.modules):
            if isinstance(module, Scaled):
                module.process()
            staged.commit(module)
            if place == 1 and self.breaks[0]:
                self.breaks[0] -= 1
                raise RuntimeError("the kernel does not like it")

    def wanted_digest(self) -> str:
        known = self.replacement.checkpoint if self.replacement else ""
        return find_checkpoint(self.model).digest() or known

    def check_settings(self) -> None:
        """All checkpoints are of one model here."""


def scaled(folder: Path, seed: int, scale: float | None) -> Path:
    """A checkpoint, with a scale in its second layer unless that is None."""
    write_checkpoint(folder, seed, SIZE)
    if scale is not None:
        first = folder / "model-0.safetensors"
        save_file({**load_file(first), "1.scale": torch.tensor(scale)}, first)
    return folder


def fresh(folder: Path) -> str:
    """What a model answers that was built with this checkpoint."""
    return answer(ScaledEngine(folder).build(lambda model: _fill(model, folder)), SIZE)


def _fill(model: nn.Module, folder: Path) -> None:
    parameters = dict(model.named_parameters())
    for file in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            parameters[name].copy_(tensor)

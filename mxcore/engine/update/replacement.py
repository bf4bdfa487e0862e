"""Building a model whose modules run already: staged, filled, then written over what ran before."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from mxcore.engine.protocol import Fill
from mxcore.engine.update.running import Running
from mxcore.engine.weights import Staged
from mxcore.errors import LayoutUnsupported

__all__ = ["Replacement"]


class Replacement:
    """What `Engine.build` and `Engine.building_state` do for an update. One thread.

    New weights are staged on `device`: host memory, so that an accelerator needs no room for a second model.
    """

    device = torch.device("cpu")

    def __init__(self, running: Running) -> None:
        self.running = running
        self.checkpoint = ""
        """The digest of what is wanted, where files here cannot say it."""
        self._staged: Staged | None = None

    def build(self, fill: Fill, process: Callable[[Staged], None]) -> nn.Module:
        """The same model with other weights. `process` makes of what was filled what the engine computes with, and
        commits each module. Until `fill` returns nothing that runs has changed. Raises what the two raise.
        """
        running = self.running
        if running.constructed is None:
            raise LayoutUnsupported("how this model was built is not known: it can only be loaded anew, by a restart")
        self._staged = staged = running.constructed.stage(self.device)
        fill(running.model)
        running.begin_writing()
        staged.as_built(running.model)
        process(staged)
        staged.close()
        self._staged = None
        return running.model

    def check(self, model: nn.Module) -> None:
        """After filling, before the first byte is written. Raises LayoutMismatch."""
        if self._staged is not None:
            self._staged.require_filled(model)
            self._staged.require_ties()

    def abandon(self) -> None:
        """The model's modules are as they were. Idempotent."""
        staged, self._staged = self._staged, None
        if staged is not None:
            staged.abandon()

"""The platform's worker, which can be asked for its draft's weights."""

from __future__ import annotations

from mxcore.engine.weights.evidence import digest
from vllm_plugin import compat


class DraftWorker(compat.platform_worker()):  # type: ignore[misc]  # which one is known only here
    """For `EngineHost.load(ask="draft_digests")`."""

    def draft_digests(self) -> dict[str, str]:
        """By name, of each parameter as the engine uses it: what it shares with the model is the model's."""
        draft = self.model_runner.drafter.model
        return {
            name: f"{digest(parameter):x} {tuple(parameter.shape)}"
            for name, parameter in draft.named_parameters(remove_duplicate=False)
        }

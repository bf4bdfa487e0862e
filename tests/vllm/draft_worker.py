"""The platform's worker, which can be asked for its draft's weights; also one for the stages of a pipeline."""

from __future__ import annotations

from mxcore.engine.weights.evidence import digest
from tests.vllm.parallel_worker import ParallelWorker
from vllm_plugin import compat


class DraftWorker(compat.platform_worker()):  # type: ignore[misc]  # which one is known only here
    """For `EngineHost.load(ask="draft_digests")`."""

    def draft_digests(self) -> dict[str, str]:
        """By name, of each parameter as the engine uses it: what it shares with the model is the model's. Empty where
        this process has no draft."""
        drafter = getattr(self.model_runner, "drafter", None)
        if drafter is None:
            return {}
        return {
            name: f"{digest(parameter):x} {tuple(parameter.shape)}"
            for name, parameter in drafter.model.named_parameters(remove_duplicate=False)
        }


class StagedDraftWorker(DraftWorker, ParallelWorker):
    """The same for a stage of a pipeline."""

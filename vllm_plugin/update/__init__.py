"""New weights for a running vLLM engine: the weight transfer engine `mx` (docs/vllm.md, "Updates")."""

from __future__ import annotations

from vllm.config import VllmConfig

from vllm_plugin.update.draining import drain_preempted
from vllm_plugin.update.registering import register_transfer_engine

__all__ = ["drain_preempted", "register_transfer_engine", "reload_by_ladder"]


def reload_by_ladder(vllm_config: VllmConfig) -> None:
    """See `vllm_plugin.update.reloading`, which needs all that loading needs."""
    from vllm_plugin.update import reloading

    reloading.reload_by_ladder(vllm_config)

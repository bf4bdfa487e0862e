"""New weights for a running vLLM engine: the weight transfer engine `mx` (docs/vllm.md, "Updates")."""

from __future__ import annotations

from vllm_plugin.update.registering import register_transfer_engine

__all__ = ["register_transfer_engine"]

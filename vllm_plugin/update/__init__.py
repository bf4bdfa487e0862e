"""New weights for a running vLLM engine: the weight transfer engine `mx` (docs/reference/vllm.md, "Updates")."""

from __future__ import annotations

from vllm_plugin.update.draining import drain_preempted
from vllm_plugin.update.rank_answers import take_all_answers
from vllm_plugin.update.registering import register_transfer_engine, reload_by_us

__all__ = ["drain_preempted", "register_transfer_engine", "reload_by_us", "take_all_answers"]

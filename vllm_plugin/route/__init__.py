"""The HTTP route of updates in vLLM's API server, and the readiness beside it. Imports nothing of vLLM."""

from __future__ import annotations

from vllm_plugin.route.endpoint import MxEndpoint

__all__ = ["MxEndpoint"]

"""How the weight transfer engine comes into vLLM, and a question about updates into its workers."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

from vllm.config import VllmConfig

from vllm_plugin import compat

__all__ = ["add_worker_method", "register_transfer_engine"]


def add_worker_method(vllm_config: VllmConfig, name: str, method: Callable[..., Any]) -> None:
    """Gives the engine's workers a method, which `collective_rpc` can name. Idempotent."""
    kind = compat.worker_class(vllm_config)
    if kind is not None and not hasattr(kind, name):
        setattr(kind, name, method)


def register_transfer_engine(names: tuple[str, ...], module: str, kind: str) -> None:
    """Registers a weight transfer engine under names that nobody has; nothing in a vLLM without such engines.

    vLLM's own `modelexpress` (0.32) is taken where it could only say that NVIDIA's package is missing.
    """
    try:
        factory = importlib.import_module("vllm.distributed.weight_transfer.factory").WeightTransferEngineFactory
    except (ImportError, AttributeError):
        return
    registry = getattr(factory, "_registry", {})
    for name in names:
        if name == "modelexpress" and importlib.util.find_spec("modelexpress_rl") is None and not compat.has_theirs():
            registry.pop(name, None)
        if name not in registry:
            factory.register_engine(name, module, kind)

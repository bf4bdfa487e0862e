"""How the weight transfer engine comes into vLLM, and a question about updates and our reloads into its workers."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

from vllm.config import VllmConfig

from vllm_plugin import compat

__all__ = ["add_worker_method", "register_transfer_engine", "reload_by_us"]

_RELOADING = "vllm_plugin.update.reloading"


def add_worker_method(vllm_config: VllmConfig, name: str, method: Callable[..., Any]) -> None:
    """Gives the engine's workers a method, which `collective_rpc` can name. Idempotent."""
    kind = compat.worker_class(vllm_config)
    if kind is not None and not hasattr(kind, name):
        setattr(kind, name, method)


def reload_by_us(vllm_config: VllmConfig) -> None:
    """Has the engine's worker class take weights anew by `reloading`. Idempotent; nothing for a class not known."""
    kind = compat.worker_class(vllm_config)
    for name in ("reload_weights", "sleep", "wake_up"):
        theirs = getattr(kind, name, None)
        if kind is None or theirs is None or hasattr(theirs, "reloads_by_us"):
            continue

        @functools.wraps(theirs)
        def ours(self: Any, *args: Any, name: str = name, theirs: Callable[..., Any] = theirs, **kwargs: Any) -> Any:
            function = getattr(importlib.import_module(_RELOADING), name)  # heavy, and later: it needs the engine
            return function(theirs, self, *args, **kwargs)

        ours.reloads_by_us = True  # type: ignore[attr-defined]
        setattr(kind, name, ours)


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

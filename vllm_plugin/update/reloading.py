"""vLLM's own doors to weights, by the ladder of loads: `reload_weights`, and waking up from a sleep that dropped them.

vLLM would read files for the first, leaves the second to whoever woke it, and its layerwise reload is wrong for some
models (0.32: docs/vllm.md, Updates).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from vllm.config import VllmConfig, set_current_vllm_config

from mxcore.engine import Running, running_of
from vllm_plugin import compat
from vllm_plugin.update.live_engine import Version, held, take

__all__ = ["reload_by_ladder"]

_CACHES = ("reset_lora_state", "reset_encoder_cache", "reset_mm_cache")
_DROPS_WEIGHTS = 2  # the least level of sleep that does


def reload_by_ladder(vllm_config: VllmConfig) -> None:
    """Has the engine's workers take weights that way. After `compat.watch_worker`; idempotent.

    Nothing changes for a model that was not loaded by us or cannot be filled while it runs, and for weights that a
    caller brings himself.
    """
    kind: Any = compat.worker_class(vllm_config)
    if kind is None or hasattr(kind.sleep, "by_ladder"):
        return
    sleep, wake_up, reload_weights = kind.sleep, kind.wake_up, getattr(kind, "reload_weights", None)

    @functools.wraps(sleep)
    def sleeping(self: Any, level: int = 1, *args: Any, **kwargs: Any) -> Any:
        if level >= _DROPS_WEIGHTS:
            for running in _running(self):
                running.is_whole = False
        return sleep(self, level, *args, **kwargs)

    @functools.wraps(wake_up)
    def waking(self: Any, tags: Sequence[str] | None = None, *args: Any, **kwargs: Any) -> Any:
        woken = wake_up(self, tags, *args, **kwargs)
        theirs = getattr(self, "weight_transfer_engine", None)
        brings_others = theirs is not None and not getattr(theirs, "ends_offers", False)  # who trains sends them
        if (tags is None or "weights" in tags) and not brings_others:
            for running in _running(self):
                if not running.is_whole:
                    _load_again(self, running, held(running))
        return woken

    sleeping.by_ladder = True  # type: ignore[attr-defined]
    kind.sleep, kind.wake_up = sleeping, waking
    if reload_weights is None:
        return

    @functools.wraps(reload_weights)
    def reloading(self: Any, *args: Any, **kwargs: Any) -> Any:
        models = [running for running in _running(self) if not running.engine.part]
        path = kwargs.get("weights_path")
        if args or kwargs.keys() - {"weights_path"} or not models:
            return reload_weights(self, *args, **kwargs)
        _load_again(self, models[0], Version(path=path) if path else held(models[0]))
        for name in _CACHES:
            if reset := getattr(self.model_runner, name, None):
                reset()
        return None

    kind.reload_weights = reloading


def _running(worker: Any) -> list[Running]:
    """The worker's models that can be filled while they run."""
    instance = compat.engine_of(worker.vllm_config)
    found = [running_of(instance, part) for part in ("", "draft")]
    return [running for running in found if running is not None and running.constructed is not None]


def _load_again(worker: Any, running: Running, version: Version) -> None:
    """Also where the model has these weights: its memory may have lost them. Raises UpdateFailed."""
    vllm_config = worker.vllm_config
    if version == held(running):  # it may be known here without its files
        version = replace(version, checkpoint=running.checkpoint)
    is_draft = bool(running.engine.part)
    model_config = vllm_config.speculative_config.draft_model_config if is_draft else vllm_config.model_config
    with set_current_vllm_config(vllm_config):
        take(running, version, vllm_config, model_config, always=True)

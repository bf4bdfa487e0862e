"""vLLM's own ways to get weights anew, by our places: `reload_weights`, and waking up from a sleep that dropped them.

vLLM (0.32) reloads from files alone, and wrongly where processing keeps something beside the parameters: experts and
tied embeddings on a CPU, int8. After `sleep(2)` it leaves the weights to whoever woke the engine up. Each function
stands for the worker's method of its name, which is `theirs` (`registering.reload_by_us`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from vllm.config import VllmConfig, set_current_vllm_config

from mxcore.engine import Running, leave, running_of
from vllm_plugin import compat
from vllm_plugin.update.live_engine import Version, held, take, take_back

__all__ = ["reload_weights", "sleep", "wake_up"]

_PARTS = ("", "draft")
_RESETS = ("reset_lora_state", "reset_encoder_cache", "reset_mm_cache")  # as vLLM's own reload does
_log = logging.getLogger("vllm.modelexpress")


def reload_weights(
    theirs: Callable[..., Any],
    worker: Any,
    weights_iterator: Any = None,
    weights_path: str | None = None,
    is_checkpoint_format: bool = True,
) -> None:
    """Takes the version that the engine has once more, or the folder `weights_path`. Raises UpdateFailed.

    A model that cannot be updated, and tensors that the caller gives, are left to vLLM's own.
    """
    running = _running(worker, "")
    if weights_iterator is not None or not is_checkpoint_format or running is None or running.constructed is None:
        _log.info("weights are reloaded by vLLM itself")
        if running is not None:
            running.checkpoint = ""  # nobody knows what they are then
        theirs(worker, weights_iterator, weights_path, is_checkpoint_format)
        return
    version = held(running) if weights_path is None else Version(path=weights_path, label=weights_path)
    leave("the engine's weights are reloaded", running.engine.instance, "")
    with set_current_vllm_config(worker.vllm_config):
        take(running, version, worker.vllm_config, worker.vllm_config.model_config, anew=True)
    for name in _RESETS:
        if (reset := getattr(worker.model_runner, name, None)) is not None:
            reset()


def sleep(theirs: Callable[..., Any], worker: Any, level: int = 1, *args: Any, **kwargs: Any) -> Any:
    """Above level 1 the weights are lost."""
    if level > 1:
        for running in _all_running(worker):
            running.drop()
    return theirs(worker, level, *args, **kwargs)


def wake_up(theirs: Callable[..., Any], worker: Any, tags: Any = None, *args: Any, **kwargs: Any) -> Any:
    """Also takes the weights that a sleep dropped. Raises UpdateFailed: the engine must not answer then."""
    result = theirs(worker, tags, *args, **kwargs)
    if tags is None or "weights" in tags:
        for running in _all_running(worker):
            if running.is_dropped:
                with set_current_vllm_config(worker.vllm_config):
                    take_back(running, worker.vllm_config, _model_config(worker.vllm_config, running))
    return result


def _running(worker: Any, part: str) -> Running | None:
    return running_of(compat.engine_of(getattr(worker, "vllm_config", None)), part)


def _all_running(worker: Any) -> list[Running]:
    return [running for part in _PARTS if (running := _running(worker, part)) is not None]


def _model_config(vllm_config: VllmConfig, running: Running) -> Any:
    """The draft's own, for a draft."""
    return vllm_config.speculative_config.draft_model_config if running.engine.part else vllm_config.model_config

"""Drafts of speculative decoding: models that vLLM loads beside the engine's own, by a call of its own."""

from __future__ import annotations

from vllm.config import ModelConfig, VllmConfig
from vllm.distributed import parallel_state

__all__ = ["draft_of", "drafted_model", "has_weights", "is_draft", "loading_ranks"]


def is_draft(vllm_config: VllmConfig, model_config: ModelConfig) -> bool:
    """Whether this call loads the draft model of speculative decoding."""
    speculative = getattr(vllm_config, "speculative_config", None)
    if model_config is getattr(speculative, "target_model_config", None):
        return False  # methods without a draft (ngram, suffix) name the model itself as their draft
    return speculative is not None and (
        model_config is speculative.draft_model_config
        or model_config is not vllm_config.model_config
        or getattr(model_config, "runner_type", None) == "draft"
    )


def draft_of(vllm_config: VllmConfig, model_config: ModelConfig) -> str:
    """What tells a draft from the model that it drafts for, and from other drafts of the same files; empty: it is none.

    The same checkpoint can hold both (multi-token prediction).
    """
    if not is_draft(vllm_config, model_config):
        return ""
    kinds = getattr(model_config.hf_config, "architectures", None) or [type(model_config.hf_config).__name__]
    return f"{vllm_config.speculative_config.method}: {', '.join(kinds)}"


def has_weights(vllm_config: VllmConfig, model_config: ModelConfig) -> bool:
    """False for a draft that only keeps what the model computed, and loads nothing."""
    method = getattr(getattr(vllm_config, "speculative_config", None), "method", None)
    return not (method == "extract_hidden_states" and is_draft(vllm_config, model_config))


def drafted_model(vllm_config: VllmConfig) -> str:
    """What the user named as the model for which a draft is loaded."""
    known = getattr(vllm_config.speculative_config, "target_model_config", None)
    return str((known or vllm_config.model_config).model)


def loading_ranks(vllm_config: VllmConfig, model_config: ModelConfig) -> list[int]:
    """All processes that load this model together. Of a pipeline only the last stage has the draft."""
    if vllm_config.parallel_config.pipeline_parallel_size == 1 or not is_draft(vllm_config, model_config):
        return list(parallel_state.get_world_group().ranks)
    try:
        return list(parallel_state.get_ep_group().ranks)  # tensor and data parallelism of this stage
    except (AttributeError, AssertionError):  # a version or a model that has no such group
        return list(parallel_state.get_tp_group().ranks)

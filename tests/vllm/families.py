"""Small random models of the families in docs/explanation/layouts.md, by transformers' names of configurations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from mxbench.demo import models

_DECODER = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
_MLA = {
    **_DECODER,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 64,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 512,
    "q_lora_rank": None,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 64,
    "v_head_dim": 32,
    "tie_word_embeddings": False,
}


class Family(NamedTuple):
    """One model: its type in transformers, its shape, and what the written config.json must say in addition."""

    model_type: str
    shape: dict[str, Any]
    also: dict[str, Any] = {}  # noqa: RUF012 - never written to


FAMILIES = {
    "qwen3_moe": Family(
        "qwen3_moe",
        {
            **_DECODER,
            "head_dim": 32,
            "moe_intermediate_size": 64,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "tie_word_embeddings": False,
        },
    ),
    "mixtral": Family("mixtral", {**_DECODER, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "gemma": Family("gemma2", {**_DECODER, "head_dim": 32, "sliding_window": 64, "query_pre_attn_scalar": 32}),
    "deepseek_v3": Family("deepseek_v3", {**_MLA, "n_group": 2, "topk_group": 1}, {"topk_method": "noaux_tc"}),
}


_LONG = [1.0 + 0.5 * index for index in range(16)]

SPECIAL = {
    "phi3": Family(
        "phi3",
        {
            **_DECODER,
            "original_max_position_embeddings": 64,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0] * 16,
                "long_factor": _LONG,
                "original_max_position_embeddings": 64,
            },
            "tie_word_embeddings": False,
            "pad_token_id": 0,
        },
    ),
    "gemma3n": Family(
        "gemma3n_text",
        {
            **_DECODER,
            "num_hidden_layers": 6,
            "num_kv_shared_layers": 2,
            "head_dim": 32,
            "vocab_size_per_layer_input": 512,
            "hidden_size_per_layer_input": 32,
            "laurel_rank": 16,
            "sliding_window": 64,
            "altup_num_inputs": 2,
            "layer_types": ["sliding_attention", "full_attention"] * 3,
            "activation_sparsity_pattern": [0.0] * 6,
        },
    ),
}
"""Models whose modules depend on the engine's options, or keep what requests write."""

_TEXT: dict[str, Any] = {**_DECODER, "model_type": "gemma", "head_dim": 32}
_VISION: dict[str, Any] = {
    "model_type": "siglip_vision_model",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 16,
    "projection_dim": 128,
    "vision_use_head": False,
}


def classifier(folder: Path, *, seed: int = 20) -> Path:
    """A decoder with a classifier's head and none for tokens, as transformers write it; returns `folder`."""
    import torch
    from safetensors.torch import load_file, save_file

    models.generate(folder, "qwen3", {**_DECODER, "head_dim": 32, "tie_word_embeddings": True}, seed=seed)
    shards = models.weight_files(folder)
    tensors = {
        name: tensor for file in shards if file.suffix == ".safetensors" for name, tensor in load_file(file).items()
    }
    tensors["score.weight"] = torch.randn(3, 128, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)
    for file in shards:
        file.unlink()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    labels = {"id2label": {str(index): f"label {index}" for index in range(3)}}
    _add(folder, {"architectures": ["Qwen3ForSequenceClassification"], "pad_token_id": 0, **labels})
    return folder


def sees(folder: Path) -> Path:
    """A model for text and pictures, PaliGemma's small sister; returns `folder`."""
    if (folder / "ready").exists():
        return folder
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    folder.mkdir(parents=True)
    vocabulary = models.write_tokenizer(folder)
    config = AutoConfig.for_model(
        "paligemma",
        text_config={**_TEXT, "vocab_size": vocabulary + 64},
        vision_config=_VISION,
        projection_dim=128,
        image_token_index=vocabulary,
        bos_token_id=0,
        eos_token_id=1,
    )
    model = AutoModelForImageTextToText.from_config(config).to(torch.bfloat16)
    models.fill(model, seed=20)
    model.save_pretrained(folder, max_shard_size="1MB")
    settings = {
        "image_processor_type": "SiglipImageProcessor",
        "processor_class": "PaliGemmaProcessor",
        "image_seq_length": 4,
        "size": {"height": 32, "width": 32},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    (folder / "ready").touch()
    return folder


def _add(folder: Path, settings: dict[str, Any]) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def generate(folder: Path, name: str, *, seed: int = 20) -> Path:
    """Writes the checkpoint of a family; returns `folder`."""
    family = (FAMILIES | SPECIAL)[name]
    models.generate(folder, family.model_type, family.shape, seed=seed)
    _add(folder, family.also)
    return folder

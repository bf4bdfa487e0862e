"""Small drafts for the tests' models: heads of EAGLE and EAGLE 3, a model with a layer for multi-token prediction."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from mxbench.demo.models import WEIGHTS_STANDARD_DEVIATION
from tests.vllm import families

_TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
LAST_LAYER = "model.layers.1."  # of the tests' models


def eagle(folder: Path, model: Path, *, own_embedding: bool = False) -> Path:
    """A head of one layer for the Llama at `model`, as EAGLE's checkpoints are; returns `folder`.

    With `own_embedding` it has an embedding of its own, which vLLM takes then; else it uses the model's.
    """
    config = _config_of(model)
    shapes = {"fc.weight": (config["hidden_size"], 2 * config["hidden_size"])}
    shapes |= {f"layers.0.{name}": shape for name, shape in _layer(config).items() if "input_layernorm" not in name}
    if own_embedding:
        shapes["embed_tokens.weight"] = (config["vocab_size"], config["hidden_size"])
    return _write(folder, model, {**config, "num_hidden_layers": 1}, _random(shapes, 31))


def eagle3(folder: Path, model: Path) -> Path:
    """A head of EAGLE 3 with a vocabulary of its own, half of the model's; returns `folder`."""
    import torch

    config = _config_of(model)
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    layer = _layer(config)
    for name in ("q_proj", "k_proj", "v_proj"):
        layer[f"self_attn.{name}.weight"] = (layer[f"self_attn.{name}.weight"][0], 2 * hidden)
    shapes = {f"midlayer.{name}": shape for name, shape in layer.items()}
    shapes |= {
        "fc.weight": (hidden, 3 * hidden),
        "midlayer.hidden_norm.weight": (hidden,),
        "norm.weight": (hidden,),
        "lm_head.weight": (vocabulary // 2, hidden),
    }
    tensors = _random(shapes, 32)
    tensors["d2t"] = torch.arange(vocabulary // 2)  # its token i is the model's 2 i
    written = {
        **config,
        "architectures": ["LlamaForCausalLMEagle3"],
        "num_hidden_layers": 1,
        "draft_vocab_size": vocabulary // 2,
    }
    return _write(folder, model, written, tensors)


def with_mtp(folder: Path) -> Path:
    """A DeepSeek V3 whose checkpoint also has the layer for multi-token prediction; returns `folder`."""
    from safetensors.torch import load_file

    plain = families.generate(folder.with_name(f"{folder.name}-plain"), "deepseek_v3")
    config = _config_of(plain)
    tensors: dict[str, Any] = {}
    for file in sorted(plain.glob("*.safetensors")):
        tensors |= load_file(file)
    layer = f"model.layers.{config['num_hidden_layers']}."
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    shapes: dict[str, tuple[int, ...]] = {
        layer + name.removeprefix(LAST_LAYER): tuple(tensor.shape)
        for name, tensor in tensors.items()
        if name.startswith(LAST_LAYER)
    }
    shapes |= {layer + name: (hidden,) for name in ("enorm.weight", "hnorm.weight", "shared_head.norm.weight")}
    shapes[layer + "eh_proj.weight"] = (hidden, 2 * hidden)
    shapes |= {layer + name: (vocabulary, hidden) for name in ("embed_tokens.weight", "shared_head.head.weight")}
    tensors |= _random(shapes, 33)
    return _write(folder, plain, {**config, "num_nextn_predict_layers": 1}, tensors)


def _config_of(model: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((model / "config.json").read_text())
    return config


def _layer(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    values = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    return {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (hidden, hidden),
        "self_attn.k_proj.weight": (values, hidden),
        "self_attn.v_proj.weight": (values, hidden),
        "self_attn.o_proj.weight": (hidden, hidden),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
    }


def _random(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, Any]:
    import torch

    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, shape in shapes.items():
        values = torch.randn(shape, generator=generator) * WEIGHTS_STANDARD_DEVIATION
        made[name] = (1 + values if "norm" in name else values).to(torch.bfloat16)
    return made


def _write(folder: Path, tokenizer_of: Path, config: dict[str, Any], tensors: dict[str, Any]) -> Path:
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    for name in _TOKENIZER:
        shutil.copy(tokenizer_of / name, folder / name)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder

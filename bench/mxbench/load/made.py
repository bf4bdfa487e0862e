"""The checkpoint that is loaded, made of random bf16, and the header that is parsed."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import numpy as np

from mxcore.digest import xxh3_64

SHARDS = 4
ROWS = 4096


def checkpoint(folder: Path, size_bytes: int, seed: int = 0) -> dict[str, int]:
    """Writes shards as a model's layers look (a norm, a bias, projections of 8 to 64 MiB); name → XXH3-64."""
    random = np.random.default_rng(seed)
    digests: dict[str, int] = {}
    shard_bytes, layer = size_bytes // SHARDS, 0
    for shard in range(SHARDS):
        tensors: dict[str, list[int]] = {}
        room = shard_bytes
        while room > 0:
            for name, shape in _layer():
                if room <= 0:
                    break
                if 2 * shape[0] * (shape[1] if len(shape) > 1 else 1) > room and len(shape) > 1:
                    shape = [max(1, room // (2 * shape[1])), shape[1]]
                tensors[f"model.layers.{layer}.{name}"] = shape
                room -= 2 * int(np.prod(shape))
            layer += 1
        _write(folder / f"model-{shard + 1:05}-of-{SHARDS:05}.safetensors", tensors, random, digests)
    return digests


def _layer() -> list[tuple[str, list[int]]]:
    return [
        ("input_layernorm.weight", [ROWS]),
        ("mlp.down_proj.weight", [ROWS, 2 * ROWS]),
        ("mlp.gate_proj.weight", [2 * ROWS, ROWS]),
        ("self_attn.k_proj.bias", [1000]),
        ("self_attn.k_proj.weight", [1024, ROWS]),
        ("self_attn.q_proj.weight", [ROWS, ROWS]),
    ]


def _write(
    file: Path,
    tensors: dict[str, list[int]],
    random: np.random.Generator,
    digests: dict[str, int],
    *,
    odd: bool = False,
) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape in tensors.items():
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8 + odd)
    with file.open("wb", buffering=8 << 20) as opened:
        opened.write(struct.pack("<Q", len(text)) + text)
        for name, shape in tensors.items():
            data = random.bytes(2 * int(np.prod(shape)))
            digests[name] = xxh3_64(data)
            opened.write(data)
        opened.flush()
        os.fsync(opened.fileno())  # clean pages, that can be dropped


def odd_tensors(folder: Path, count: int, seed: int = 0) -> dict[str, int]:
    """Writes one file of that many tensors of 1 to 7 KiB, none where its dtype would want it; name → XXH3-64."""
    random = np.random.default_rng(seed)
    digests: dict[str, int] = {}
    shapes = {f"experts.{number}.scale": [int(random.integers(500, 3500))] for number in range(count)}
    _write(folder / "model.safetensors", shapes, random, digests, odd=True)
    return digests


def header_of(count: int) -> bytes:
    """The first bytes of a file of that many small tensors, as a mixture-of-experts model has them."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    for index in range(count):
        name = f"model.layers.{index // 384}.mlp.experts.{index % 384}.gate_up_proj.weight"
        header[name] = {"dtype": "BF16", "shape": [16, 8], "data_offsets": [256 * index, 256 * (index + 1)]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text

"""What a download leaves out: copies of the weights in other forms, as vLLM and ModelExpress do (findings, row 19)."""

from __future__ import annotations

import pytest

from mxserver.wire import left_out

GPT_OSS = [
    "config.json",
    "model-00000-of-00002.safetensors",
    "model.safetensors.index.json",
    "metal/model.bin",
    "original/config.json",
    "original/model.safetensors",
    "tokenizer.json",
]


@pytest.mark.parametrize(
    ("names", "out"),
    [
        (GPT_OSS, {"metal/model.bin", "original/config.json", "original/model.safetensors"}),
        (["model.safetensors", "pytorch_model.bin", "x.gguf"], {"pytorch_model.bin"}),
        (["model.safetensors", "2_Dense/pytorch_model.bin"], set()),
        (["config.json", "pytorch_model.bin"], set()),
        (["config.json", "original/consolidated.00.pth"], set()),
        (["config.json", "original.json", "m.safetensors"], set()),
    ],
)
def test_unless_told_otherwise(names: list[str], out: set[str]) -> None:
    assert left_out(names) == out


def test_patterns_of_the_users_own() -> None:
    names = ["a.safetensors", "a.bin", "sub/b.bin", "original/x"]
    assert left_out(names, ()) == set()
    assert left_out(names, ("*.bin",)) == {"a.bin", "sub/b.bin"}
    assert left_out(names, (), ("*.safetensors", "original/*")) == {"a.bin", "sub/b.bin"}
    assert left_out(names, None, ("a.*",)) == {"a.bin", "sub/b.bin", "original/x"}

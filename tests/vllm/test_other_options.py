"""Source and target in other options: what is local stays the target's own, and other kernels are refused by name.

The table in docs/vllm.md, "What is moved", is this file's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bench.demo.models import weight_files
from bench.demo.processes import files_away
from tests.vllm import families
from tests.vllm.engines import EngineHost

EAGER: dict[str, Any] = {"enforce_eager": True}
NOT_EAGER: dict[str, Any] = {"enforce_eager": False}
LORA: dict[str, Any] = {"enable_lora": True, "max_lora_rank": 8}
PAIRS = {"eager to not": (EAGER, NOT_EAGER), "not to eager": (NOT_EAGER, EAGER), "lora": (EAGER, {**EAGER, **LORA})}


@pytest.mark.parametrize("kind", ["raw", "processed"])
@pytest.mark.parametrize("pair", sorted(PAIRS))
def test_they_share_weights(
    pair: str, kind: str, source: EngineHost, target: EngineHost, unpacked: None, model_paths: dict[str, Path]
) -> None:
    model = model_paths["llama"]
    theirs, ours = PAIRS[pair]
    expected = target.load(model, "auto", **ours).answers

    first = source.load(model, extra={"layout": kind}, **theirs)
    with files_away(weight_files(model)):
        second = target.load(model, extra={"layout": kind}, **ours)

    assert first.report["fallbacks"] == second.report["fallbacks"] == []
    assert (second.report["path"], second.report["layout"]) == ("p2p", kind)
    assert second.answers == expected


def test_another_kernel_at_equal_shapes_is_refused_by_its_class(
    source: EngineHost, target: EngineHost, unpacked: None, folder: Path
) -> None:
    model = families.generate(folder / "options" / "qwen3_moe", "qwen3_moe")
    expected = target.load(model, "auto", **LORA).answers

    first = source.load(model, extra={"layout": "processed"})
    second = target.load(model, extra={"layout": "processed"}, **LORA)

    assert first.report["serving"]
    assert second.report["path"] == "storage"
    assert second.answers == expected
    told = " ".join(second.report["fallbacks"])
    assert "MX_LAYOUT_MISMATCH" in told
    assert "CPUUnquantizedExperts" in told or "Experts" in told

"""Source and target in other options: what is local stays the target's own, and other kernels are refused by name.

The table in docs/explanation/layouts.md, "Workers in other options", is this file's.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from mxbench.demo.models import weight_files
from mxbench.demo.processes import files_away
from tests.vllm import families
from tests.vllm.engines import EngineHost

PAGE = Path(__file__).parents[2] / "docs" / "explanation" / "layouts.md"
NOT_EAGER: dict[str, Any] = {"enforce_eager": False}
LORA: dict[str, Any] = {"enable_lora": True, "max_lora_rank": 8}
POOLING: dict[str, Any] = {"runner": "pooling"}
CLASSES: dict[str, Any] = {**POOLING, "convert": "classify"}
FAST: dict[str, Any] = {"kv_sharing_fast_prefill": True}
TEXT_ALONE: dict[str, Any] = {"language_model_only": True}


class Pair(NamedTuple):
    """A model, and options of source and target. Kinds of weights that they share; None: both.

    `requests` are made of the source, beside the prompts, before the target takes its weights.
    """

    model: str
    source: dict[str, Any]
    target: dict[str, Any]
    kind: str | None = None
    requests: int = 0


PAIRS = {
    "eager, compiled": Pair("llama", {}, NOT_EAGER),
    "compiled, eager": Pair("llama", NOT_EAGER, {}),
    "without LoRA, with LoRA": Pair("llama", {}, LORA),
    "longrope beyond its limit, within": Pair("phi3", {"max_model_len": 128}, {"max_model_len": 64}),
    "longrope within its limit, beyond": Pair("phi3", {"max_model_len": 64}, {"max_model_len": 128}),
    "fast prefill and 256 tokens at once, 512": Pair("gemma3n", FAST, {**FAST, "max_num_batched_tokens": 512}),
    "fast prefill after 100 requests, 512 tokens at once": Pair(
        "gemma3n", FAST, {**FAST, "max_num_batched_tokens": 512}, requests=100
    ),
    "4 requests at once, 8": Pair("llama", {}, {"max_num_seqs": 8}),
    "decoder as embedding, the same": Pair("qwen3", POOLING, POOLING),
    "decoder as classifier, the same": Pair("classifier", CLASSES, CLASSES),
    "language model alone, the same": Pair("sees", TEXT_ALONE, TEXT_ALONE),
    "KV cache as the model, in fp8": Pair("llama", {}, {"kv_cache_dtype": "fp8"}, "raw"),
}


@pytest.fixture(scope="module")
def models(folder: Path, model_paths: dict[str, Path]) -> dict[str, Path]:
    place = folder / "options"
    made = {name: families.generate(place / name, name) for name in families.SPECIAL}
    others = {"classifier": families.classifier(place / "classifier"), "sees": families.sees(place / "sees")}
    return {**model_paths, **made, **others}


@pytest.mark.parametrize(
    ("pair", "kind"),
    [(name, kind) for name, pair in PAIRS.items() for kind in ("raw", "processed") if pair.kind in (None, kind)],
)
def test_they_share_weights(
    pair: str, kind: str, source: EngineHost, target: EngineHost, unpacked: None, models: dict[str, Path]
) -> None:
    model, theirs, ours, _, requests = PAIRS[pair]
    if "kv_cache_dtype" in ours and "avx512f" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("vLLM's CPU build has no KV cache in fp8 for this processor, which lacks AVX-512")
    expected = target.load(models[model], "auto", **ours).answers

    first = source.load(models[model], extra={"layout": kind}, requests=requests, **theirs)
    with files_away(weight_files(models[model])):
        second = target.load(models[model], extra={"layout": kind}, **ours)

    assert first.report["fallbacks"] == second.report["fallbacks"] == []
    assert (second.report["path"], second.report["layout"]) == ("p2p", kind)
    assert second.answers == expected


def test_flags_of_context_parallelism_and_two_batches_stay_the_targets_own(
    source: EngineHost, target: EngineHost, unpacked: None, folder: Path
) -> None:
    """Finding A1: taken from a source without, the flags made vLLM end the engine. It does not run with them."""
    model = families.generate(folder / "options" / "qwen3_moe", "qwen3_moe")
    flags: dict[str, Any] = {"worker_cls": "tests.vllm.flags_worker.FlagsWorker", "ask": "flags"}
    expected = target.load(model, "auto", **flags).answers
    first = source.load(model, extra={"layout": "processed"})
    with files_away(weight_files(model)):
        second = target.load(model, extra={"layout": "processed"}, **flags)

    assert first.report["fallbacks"] == second.report["fallbacks"] == []
    assert second.report["path"] == "p2p"
    assert second.answers == expected
    assert expected[0][:2] == [[True], [True]]


def test_experts_stay_ready_for_lora(source: EngineHost, target: EngineHost, folder: Path) -> None:
    """Finding A1: a target with LoRA took the flag of a source without. Raw weights: the kernels are others."""
    model = families.generate(folder / "options" / "qwen3_moe", "qwen3_moe")
    asked: dict[str, Any] = {"worker_cls": "tests.vllm.flags_worker.ExpertsWorker", "ask": "lora_flags"}
    expected = target.load(model, "auto", **asked, **LORA).answers
    first = source.load(model, **asked)
    with files_away(weight_files(model)):
        second = target.load(model, **asked, **LORA)

    assert first.report["fallbacks"] == second.report["fallbacks"] == []
    assert (second.report["path"], second.report["layout"]) == ("p2p", "raw")
    assert second.answers == expected
    assert (first.answers[0][0], expected[0][0]) == ([False], [True])


def test_attention_layers_for_a_cache_in_fp8_are_no_reason(
    source: EngineHost, target: EngineHost, model_paths: dict[str, Path]
) -> None:
    """Where no engine runs with it: vLLM's layers, built for it, have the same raw weights."""
    model = model_paths["llama"]
    cache: dict[str, Any] = {"worker_cls": "tests.vllm.flags_worker.CacheWorker", "ask": "caches"}
    expected = target.load(model, "auto", **cache).answers
    first = source.load(model)
    with files_away(weight_files(model)):
        second = target.load(model, **cache)
        source.ask("leave")
        third = source.load(model)

    assert first.report["fallbacks"] == second.report["fallbacks"] == []
    assert (second.report["path"], third.report["path"]) == ("p2p", "p2p")
    assert second.answers == expected
    assert expected[0][0] == ["fp8"]
    assert third.answers == first.answers


def test_gptq_as_marlin_has_it(source: EngineHost) -> None:
    """Finding B3: the empty zero points, which Marlin does not use, were taken for packed away."""
    done = source.ask("call", function="tests.vllm.marlin:exchange")["result"]
    names = [f"layers.0.{name}" for name in ("qweight", "qzeros", "scales")]
    assert set(names) <= set(done["moved"])
    assert done["empty"]
    assert sorted(done["equal"]) == sorted({*done["equal"], *names})
    assert {"layers.0.qweight", "layers.0.scales"} <= set(done["changed"])
    assert done["structure"]


def test_another_kernel_at_equal_shapes_is_refused_by_its_class(
    source: EngineHost, target: EngineHost, unpacked: None, folder: Path
) -> None:
    """With LoRA vLLM takes another MoE kernel, whose weights have the same shapes and other bytes.

    That one is Triton's, which the CPU build does not have: the engine ends after it was loaded, vLLM's own loader or
    ours. So the report is looked at, which is written before.
    """
    model = families.generate(folder / "options" / "qwen3_moe", "qwen3_moe")
    first = source.load(model, extra={"layout": "processed"})
    report = folder / f"{target.name}-{target._loads}.json"

    with pytest.raises(AssertionError, match="triton"):
        target.load(model, extra={"layout": "processed"}, **LORA)
    target.renew()

    assert first.report["serving"]
    second = json.loads(report.read_text())
    assert second["path"] == "storage"
    told = " ".join(second["fallbacks"])
    assert "MX_LAYOUT_MISMATCH" in told
    assert "CPUUnquantizedExperts" in told
    assert "TritonExperts" in told


def test_the_table_of_the_page_is_these() -> None:
    rows = [line.split("|")[1:-1] for line in PAGE.read_text().splitlines() if line.endswith("| p2p |")]
    told = {f"{source.strip()}, {target.strip()}": kinds.strip() for _, source, target, kinds, _ in rows}
    assert told == {name: pair.kind or "raw, processed" for name, pair in PAIRS.items()}

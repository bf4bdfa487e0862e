"""Each family of models: raw weights on the stock CPU build, processed ones where nothing packs them away."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

from mxbench.demo.models import weight_files
from mxbench.demo.processes import files_away
from tests.vllm import families, quantised
from tests.vllm.conftest import References
from tests.vllm.engines import EngineHost

GENERATORS = {
    **dict.fromkeys(families.FAMILIES, families.generate),
    **dict.fromkeys(quantised.QUANTISATIONS, quantised.generate),
}
OPAQUE = {"compressed_tensors": "qkv_proj.scheme.kernel.dnnl_handler"}  # processed weights in a oneDNN object on a CPU
if "amx_tile" in Path("/proc/cpuinfo").read_text():
    OPAQUE["deepseek_v3"] = "self_attn.kv_b_proj.weight"  # packed into the attention's own tiles, and emptied
AVX512_ALONE = ("awq", "gptq")  # vLLM's CPU build has their kernels in its library for AVX-512 alone
models_of = functools.partial(pytest.mark.parametrize, "model", indirect=True)


@pytest.fixture(scope="module")
def model(request: pytest.FixtureRequest, folder: Path) -> Path:
    if request.param in AVX512_ALONE and "avx512f" not in Path("/proc/cpuinfo").read_text():
        pytest.skip(f"vLLM's CPU build has no kernel of {request.param} for this processor, which lacks AVX-512")
    return GENERATORS[request.param](folder / "families" / request.param, request.param)


@models_of(sorted(GENERATORS))
def test_raw_weights(source: EngineHost, target: EngineHost, references: References, model: Path) -> None:
    expected = references.of(model)

    first = source.load(model)
    with files_away(weight_files(model)):
        second = target.load(model)

    assert first.answers == second.answers == expected
    assert (first.report["path"], second.report["path"]) == ("storage", "p2p")
    assert second.report["layout"] == "raw"
    assert first.report["fallbacks"] == second.report["fallbacks"] == []


@models_of(sorted(GENERATORS.keys() - OPAQUE.keys()))
def test_processed_weights(source: EngineHost, target: EngineHost, unpacked: None, model: Path) -> None:
    expected = source.load(model, "auto").answers

    first = source.load(model, extra={"layout": "processed"})
    with files_away(weight_files(model)):
        second = target.load(model, extra={"layout": "processed"})

    assert first.answers == second.answers == expected
    assert (second.report["path"], second.report["layout"]) == ("p2p", "processed")
    assert first.report["fallbacks"] == second.report["fallbacks"] == []


@models_of(sorted(OPAQUE))
def test_processed_weights_in_an_opaque_object_are_refused_by_name(
    source: EngineHost, unpacked: None, model: Path
) -> None:
    expected = source.load(model, "auto").answers

    first = source.load(model, extra={"layout": "processed"})

    assert first.answers == expected
    assert not first.report["serving"]
    assert OPAQUE[model.name] in " ".join(first.report["fallbacks"])

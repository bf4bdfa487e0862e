"""Processed weights of another engine go straight into the memory of one that runs; addresses stay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mxbench.demo.models import weight_files
from mxbench.demo.processes import files_away
from tests.vllm.engines import EngineHost
from tests.vllm.test_families import AVX512_ALONE, OPAQUE
from tests.vllm.updated import OPTIONS, TRANSFER, addresses, as_loaded, now, report_of, update, versions_of

PROCESSED: dict[str, Any] = {"extra": {"layout": "processed"}, **TRANSFER}
NAMES = sorted({"awq", "classifier", "deepseek_v3", "gemma", "llama", "minilm", "qwen3", "qwen3_moe"} - OPAQUE.keys())


@pytest.mark.parametrize("name", NAMES)
def test_there_and_back(name: str, folder: Path, source: EngineHost, target: EngineHost, unpacked: None) -> None:
    """The source has each version from storage, the target from the source, with the files away."""
    if name in AVX512_ALONE and "avx512f" not in Path("/proc/cpuinfo").read_text():
        pytest.skip(f"vLLM's CPU build has no kernel of {name} for this processor, which lacks AVX-512")
    versions, options = versions_of(folder, name), OPTIONS.get(name, {})
    expected = {model: as_loaded(source, model, **options) for model in versions}
    source.load(versions.one, keep=True, **PROCESSED, **options)
    loaded = target.load(versions.one, keep=True, **PROCESSED, **options)
    before = addresses(target)
    try:
        assert now(target) == expected[versions.one]
        for model in (versions.two, versions.one):
            state = update(source, path=str(model))
            assert now(source) == expected[model]
            with files_away(weight_files(model)):
                update(target, path=str(model), checkpoint=state["checkpoint"])
            told = report_of(loaded)
            assert (told["path"], told["layout"], told["fallbacks"]) == ("p2p", "processed", [])
            assert now(target) == expected[model]
            assert addresses(target) == before
    finally:
        source.ask("end")
        target.ask("end")


def test_what_hides_beside_parameters_comes_too(
    folder: Path, source: EngineHost, target: EngineHost, unpacked: None
) -> None:
    """In helper objects, dictionaries, numbers, on parameters: `tests.vllm.hiding`."""
    versions, options = versions_of(folder, "llama"), {"quantization": "mx_hiding"}
    for host in (source, target):
        host.ask("hiding", wider=False)
    expected = {model: as_loaded(source, model, **options) for model in versions}
    source.load(versions.one, keep=True, **PROCESSED, **options)
    loaded = target.load(versions.one, keep=True, **PROCESSED, **options)
    try:
        for model in (versions.two, versions.one):
            state = update(source, path=str(model))
            assert now(source) == expected[model]
            with files_away(weight_files(model)):
                update(target, path=str(model), checkpoint=state["checkpoint"])
            assert (report_of(loaded)["path"], report_of(loaded)["layout"]) == ("p2p", "processed")
            assert now(target) == expected[model]
    finally:
        source.ask("end")
        target.ask("end")


def test_a_holder_that_lies_changes_no_answer(
    folder: Path, source: EngineHost, target: EngineHost, unpacked: None
) -> None:
    """Its bytes are in the model's memory when they are found out: storage gives the version, else the old one."""
    versions = versions_of(folder, "llama")
    expected = {model: as_loaded(target, model) for model in versions}
    first = source.load(versions.two, keep=True, **PROCESSED).report
    assert source.ask("corrupt", name="down_proj.weight")["flipped"] > 0
    loaded = target.load(versions.one, keep=True, **PROCESSED)
    before = addresses(target)
    try:
        with files_away(weight_files(versions.two)):
            told = target.ask("update", info={"path": str(versions.two), "checkpoint": first["checkpoint"]})
        assert "MX_DIGEST_MISMATCH" in told["error"]
        assert f"{versions.one} is again: " in told["error"]
        assert told["states"][0]["models"][0]["ready"]
        assert now(target) == expected[versions.one]
        update(target, path=str(versions.two))
        assert report_of(loaded)["path"] == "storage"
        assert "MX_DIGEST_MISMATCH" in report_of(loaded)["fallbacks"][0]
        assert now(target) == expected[versions.two]
        assert addresses(target) == before
    finally:
        source.ask("end")
        target.ask("end")


def test_what_is_in_an_opaque_object_is_staged_and_processed_here(
    folder: Path, source: EngineHost, unpacked: None
) -> None:
    """oneDNN's int8 has its weights where nobody can look: refused before anything is written, then from storage."""
    versions = versions_of(folder, "compressed_tensors")
    expected = as_loaded(source, versions.two)
    loaded = source.load(versions.one, keep=True, **PROCESSED)
    try:
        update(source, path=str(versions.two))
        assert now(source) == expected
    finally:
        source.ask("end")
    assert (report_of(loaded)["path"], report_of(loaded)["serving"]) == ("storage", False)

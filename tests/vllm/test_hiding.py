"""Weights that hide: a quantisation of the tests' own, in every place that processing can put them."""

from __future__ import annotations

from pathlib import Path

from mxbench.demo.models import weight_files
from mxbench.demo.processes import files_away
from tests.vllm.conftest import References
from tests.vllm.engines import EngineHost

HIDING = {"quantization": "mx_hiding"}
PROCESSED = {"layout": "processed"}


def register(*hosts: EngineHost, wider: bool = False) -> None:
    for host in hosts:
        host.ask("hiding", wider=wider)
        host.ask("plain_linear", on=True)


def test_every_hiding_place_moves(source: EngineHost, target: EngineHost, model_paths: dict[str, Path]) -> None:
    model = model_paths["llama"]
    register(source, target)

    expected = source.load(model, "auto", **HIDING).answers
    first = source.load(model, extra=PROCESSED, **HIDING)
    with files_away(weight_files(model)):
        second = target.load(model, extra=PROCESSED, **HIDING)

    assert first.answers == second.answers == expected
    assert second.report["path"] == "p2p"


def test_raw_weights_of_a_quantised_model_move(
    source: EngineHost, target: EngineHost, model_paths: dict[str, Path]
) -> None:
    model = model_paths["llama"]
    register(source, target)

    first = source.load(model, **HIDING)
    with files_away(weight_files(model)):
        second = target.load(model, **HIDING)

    assert first.answers == second.answers
    assert (second.report["path"], second.report["layout"]) == ("p2p", "raw")


def test_another_way_to_process_is_refused_by_its_class_and_storage_serves(
    source: EngineHost, target: EngineHost, model_paths: dict[str, Path]
) -> None:
    model = model_paths["llama"]
    register(source)
    register(target, wider=True)

    first = source.load(model, extra=PROCESSED, **HIDING)
    second = target.load(model, extra=PROCESSED, **HIDING)

    assert first.report["serving"]
    assert second.report["path"] == "storage"
    assert "WiderMethod" in second.report["fallbacks"][0]
    assert "MX_LAYOUT_MISMATCH" in second.report["fallbacks"][0]
    assert second.answers == first.answers


def test_a_weight_in_a_function_is_refused_by_name(source: EngineHost, model_paths: dict[str, Path]) -> None:
    register(source)
    expected = source.load(model_paths["llama"], "auto", quantization="mx_opaque").answers
    loaded = source.load(model_paths["llama"], extra=PROCESSED, quantization="mx_opaque")

    assert loaded.answers == expected
    assert not loaded.report["serving"]
    assert "matmul" in loaded.report["fallbacks"][0]


def test_without_the_switch_the_rest_is_as_before(
    source: EngineHost, target: EngineHost, references: References, model_paths: dict[str, Path]
) -> None:
    for host in (source, target):
        host.ask("plain_linear", on=False)
    assert source.load(model_paths["llama"]).answers == references.of(model_paths["llama"])

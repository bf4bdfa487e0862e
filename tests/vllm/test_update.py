"""A running engine takes other weights: all of them or none, and then it is as vLLM's default loader makes it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from bench.demo import models
from bench.demo.models import weight_files
from bench.demo.processes import files_away
from mxserver.wire.calls import ServerClient
from mxserver.wire.proto import p2p_pb2
from tests.vllm import families, quantised
from tests.vllm.conftest import LLAMA
from tests.vllm.engines import EngineHost, Loaded

TRANSFER: dict[str, Any] = {"weight_transfer_config": {"backend": "mx"}}


@pytest.fixture(scope="module")
def versions(folder: Path) -> tuple[Path, Path]:
    """One model with two seeds: no tensor is equal."""
    place = folder / "versions"
    return models.generate(place / "1", "llama", LLAMA, seed=1), models.generate(place / "2", "llama", LLAMA, seed=2)


@pytest.fixture
def client(server: str) -> Iterator[ServerClient]:
    with ServerClient(server) as connected:
        yield connected


def now(host: EngineHost) -> dict[str, Any]:
    """What the kept engine answers, and its tensors' digests."""
    told = host.ask("answers")
    return {"answers": told["answers"], "digests": told["digests"]}


def as_loaded(host: EngineHost, model: Path, **options: Any) -> dict[str, Any]:
    """The same of an engine that vLLM's default loader loads."""
    host.load(model, "auto", keep=True, **options)
    told = now(host)
    host.ask("end")
    return told


def update(host: EngineHost, **info: Any) -> dict[str, Any]:
    """Without an error; the state of the first worker's model."""
    told = host.ask("update", info=info)
    assert told["error"] == ""
    state: dict[str, Any] = told["states"][0]["models"][0]
    assert state["ready"]
    return state


def test_from_storage_and_from_a_worker_there_and_back(
    source: EngineHost, target: EngineHost, versions: tuple[Path, Path], client: ServerClient
) -> None:
    one, two = versions
    expected = {model: as_loaded(source, model) for model in versions}
    first = source.load(one, keep=True, **TRANSFER).report
    target.load(one, keep=True, **TRANSFER)
    try:
        for model in (two, one):
            state = update(source, path=str(model))
            assert now(source) == expected[model]
            assert state["version"] == str(model)
            with files_away(weight_files(model)):
                update(target, path=str(model), checkpoint=state["checkpoint"])
            assert now(target) == expected[model]
            record = client.get_metadata(first["source_id"], first["worker_id"])
            assert record is not None
            assert record.worker.status == p2p_pb2.SOURCE_STATUS_STALE
    finally:
        source.ask("end")
        target.ask("end")
    assert expected[one] != expected[two]


def test_what_fails_leaves_the_old_version_and_its_offer(
    source: EngineHost, target: EngineHost, versions: tuple[Path, Path], folder: Path
) -> None:
    """Nothing is there; another model; a checkpoint that lacks a tensor; one that is cut off in the middle."""
    one, two = versions
    before = source.load(one, keep=True, **TRANSFER)
    try:
        was = now(source)
        for place in _broken(folder / "broken", two):
            told = source.ask("update", info={"path": str(place)})
            assert "MX_UPDATE_FAILED" in told["error"], place
            assert told["states"][0]["models"][0]["ready"]
            assert told["states"][0]["models"][0]["version"] == str(one)
            assert now(source) == was
        with files_away(weight_files(one)):
            loaded = target.load(one)
        assert loaded.report["source_worker"] == before.report["worker_id"]
        update(source, path=str(two))
    finally:
        source.ask("end")


def _broken(place: Path, model: Path) -> list[Path]:
    place.mkdir()
    made = [place / name for name in ("nothing", "config", "lacks", "cut")]
    for folder in made[1:]:
        shutil.copytree(model, folder)
    config = json.loads((made[1] / "config.json").read_text())
    (made[1] / "config.json").write_text(json.dumps({**config, "num_attention_heads": 2}))
    _rewrite(made[2], lambda tensors: {name: tensor for name, tensor in tensors.items() if "1.mlp.down" not in name})
    (last,) = weight_files(made[3])
    last.write_bytes(last.read_bytes()[:-1000])
    return made


def _rewrite(folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Changes the tensors of a checkpoint, which has one file afterwards."""
    files = weight_files(folder)
    tensors = {
        name: tensor for file in files if file.suffix == ".safetensors" for name, tensor in load_file(file).items()
    }
    for file in files:
        file.unlink()
    save_file(change(tensors), folder / "model.safetensors", metadata={"format": "pt"})


def _llama(folder: Path, seed: int) -> Path:
    return models.generate(folder, "llama", LLAMA, seed=seed)


def _minilm(folder: Path, seed: int) -> Path:
    models.minilm(folder)
    _rewrite(folder, lambda tensors: {name: tensor * (1 + seed / 8) for name, tensor in tensors.items()})
    return folder


def _classifier(folder: Path, seed: int) -> Path:
    families.classifier(folder)
    _rewrite(folder, lambda tensors: {name: tensor * (1 + seed / 8) for name, tensor in tensors.items()})
    return folder


def _quantised(folder: Path, seed: int) -> Path:
    models.generate(folder.with_name(f"{folder.name}.plain"), "llama", LLAMA, seed=seed)
    return quantised.generate(folder, folder.parent.name)


def _qwen3(folder: Path, seed: int) -> Path:
    models.qwen3(folder)
    _rewrite(folder, lambda tensors: {name: tensor * (1 + seed / 8) for name, tensor in tensors.items()})
    return folder


MAKERS: dict[str, Callable[[Path, int], Path]] = {
    **{
        name: partial(lambda folder, seed, name: families.generate(folder, name, seed=seed), name=name)
        for name in families.FAMILIES
    },
    **dict.fromkeys(quantised.QUANTISATIONS, _quantised),
    "classifier": _classifier,
    "minilm": _minilm,
    "qwen3": _qwen3,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "minilm": {"runner": "pooling"},
    "classifier": {"runner": "pooling", "convert": "classify"},
}


@pytest.mark.parametrize("name", sorted(MAKERS))
def test_every_family_is_as_the_default_loader_makes_it(name: str, source: EngineHost, folder: Path) -> None:
    """There and back on the stock CPU build: also experts, tied embeddings and kernels' handlers, which vLLM's own
    reload of weights leaves wrong (0.32)."""
    place, options = folder / "families" / name, OPTIONS.get(name, {})
    versions = [MAKERS[name](place / f"v{seed}", seed) for seed in (1, 2)]
    expected = [as_loaded(source, model, **options) for model in versions]
    source.load(versions[0], keep=True, **TRANSFER, **options)
    try:
        assert now(source) == expected[0]
        for seed in (1, 0):
            update(source, path=str(versions[seed]))
            assert now(source) == expected[seed]
    finally:
        source.ask("end")
    assert expected[0]["answers"] != expected[1]["answers"]


PROCESSED: dict[str, Any] = {"extra": {"layout": "processed"}}


def last_update(loaded: Loaded) -> dict[str, Any]:
    """The report of the engine's last update."""
    found: dict[str, Any] = json.loads(Path(f"{loaded.report_path}.update").read_text())
    return found


@pytest.mark.parametrize("name", ["llama", "qwen3", "qwen3_moe"])
def test_processed_weights_go_straight_into_the_models_memory(
    name: str, source: EngineHost, target: EngineHost, unpacked: None, folder: Path
) -> None:
    """Where nothing packs them: from storage, and from a worker that has them, there and back."""
    place = folder / "processed" / name
    maker = {**MAKERS, "llama": _llama}[name]
    versions = [maker(place / f"v{seed}", seed) for seed in (1, 2)]
    expected = [as_loaded(source, model) for model in versions]
    first = source.load(versions[0], keep=True, **TRANSFER, **PROCESSED)
    second = target.load(versions[0], keep=True, **TRANSFER, **PROCESSED)
    try:
        for seed in (1, 0):
            model = versions[seed]
            state = update(source, path=str(model))
            assert now(source) == expected[seed]
            assert last_update(first)["path"] == "storage"
            with files_away(weight_files(model)):
                update(target, path=str(model), checkpoint=state["checkpoint"])
            assert now(target) == expected[seed]
            told = last_update(second)
            assert (told["path"], told["layout"], told["fallbacks"]) == ("p2p", "processed", [])
    finally:
        source.ask("end")
        target.ask("end")
    assert expected[0]["answers"] != expected[1]["answers"]


def test_a_holder_of_wrong_bytes_costs_a_fallback_and_no_mixture(
    source: EngineHost, target: EngineHost, unpacked: None, versions: tuple[Path, Path]
) -> None:
    """They are in the model's memory when that is seen: storage makes it whole."""
    one, two = versions
    expected = as_loaded(target, two)
    source.load(two, **PROCESSED)
    loaded = target.load(one, keep=True, **TRANSFER, **PROCESSED)
    try:
        assert source.ask("corrupt", name="down_proj.weight")["flipped"] > 0
        update(target, path=str(two))
        assert now(target) == expected
        told = last_update(loaded)
        assert told["path"] == "storage"
        assert any("MX_CHUNKS_MISSING" in line or "MX_DIGEST_MISMATCH" in line for line in told["fallbacks"])
    finally:
        target.ask("end")


def test_a_draft_stays_as_it_is_unless_it_is_named(source: EngineHost, versions: tuple[Path, Path]) -> None:
    one, two = versions

    def started(draft: Path, load_format: str, **options: Any) -> Any:
        """The draft's digests, of an engine of the first version that stays."""
        speculative = {"method": "draft_model", "model": str(draft), "num_speculative_tokens": 1}
        worker = "tests.vllm.draft_worker.DraftWorker"
        return source.load(
            one,
            load_format,
            ask="draft_digests",
            keep=True,
            worker_cls=worker,
            speculative_config=speculative,
            **options,
        ).answers

    expected = {draft: started(draft, "auto") for draft in (two, one)}
    before = now(source)["digests"]
    assert started(one, "mx", **TRANSFER) == expected[one]
    try:
        update(source, path=str(two))
        assert source.ask("of_workers", method="draft_digests")["result"] == expected[one]
        after = now(source)["digests"]
        assert after.keys() == before.keys()
        assert after != before
        told = source.ask("update", info={"path": str(two)}, draft=True)
        assert told["error"] == ""
        assert [(model["part"], model["version"]) for model in told["states"][0]["models"]] == [
            ("", str(two)),
            ("draft", str(two)),
        ]
        assert source.ask("of_workers", method="draft_digests")["result"] == expected[two]
        assert now(source)["digests"] == after
    finally:
        source.ask("end")

"""Processed weights of another engine go straight into the memory of one that runs; addresses stay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bench.demo import models
from bench.demo.models import weight_files
from bench.demo.processes import files_away
from tests.vllm import families
from tests.vllm.conftest import LLAMA
from tests.vllm.engines import EngineHost
from tests.vllm.updated import TRANSFER, Versions, addresses, as_loaded, now, report_of, two_versions, update

PROCESSED: dict[str, Any] = {"extra": {"layout": "processed"}, **TRANSFER}
FAMILIES = ("deepseek_v3", "llama", "qwen3_moe")


def versions_of(folder: Path, name: str) -> Versions:
    def generate(place: Path, seed: int) -> Path:
        if name == "llama":
            return models.generate(place, "llama", LLAMA, seed=seed)
        return families.generate(place, name, seed=seed)

    return two_versions(folder / "versions" / name, generate)


@pytest.mark.parametrize("name", FAMILIES)
def test_there_and_back(name: str, folder: Path, source: EngineHost, target: EngineHost, unpacked: None) -> None:
    """The source has each version from storage, the target from the source, with the files away."""
    versions = versions_of(folder, name)
    expected = {model: as_loaded(source, model) for model in versions}
    source.load(versions.one, keep=True, **PROCESSED)
    loaded = target.load(versions.one, keep=True, **PROCESSED)
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

"""Images in which vLLM discovers no plugins (VLLM_PLUGINS is an allow-list, here an empty one)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from mxbench.demo.models import weight_files
from mxbench.demo.processes import files_away
from tests.vllm.conftest import References
from tests.vllm.engines import EngineHost


@pytest.fixture(scope="module")
def bare(folder: Path, server: str) -> Iterator[EngineHost]:
    host = EngineHost("bare", folder, server, {"VLLM_PLUGINS": ""})
    yield host
    host.close()


def test_without_a_worker_class_the_format_is_unknown(bare: EngineHost, model_paths: dict[str, Path]) -> None:
    with pytest.raises(AssertionError, match="Load format `mx` is not supported"):
        bare.load(model_paths["llama"])


def test_a_worker_class_registers_the_formats(
    bare: EngineHost, source: EngineHost, references: References, model_paths: dict[str, Path]
) -> None:
    model = model_paths["llama"]
    assert source.load(model).report["serving"]
    with files_away(weight_files(model)):
        loaded = bare.load(model, worker_cls="vllm_plugin.worker.MxWorker")

    assert loaded.answers == references.of(model)
    assert (loaded.report["path"], loaded.report["serving"]) == ("p2p", True)

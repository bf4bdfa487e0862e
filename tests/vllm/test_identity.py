"""What makes two workers' weights interchangeable, for real configurations of vLLM."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from mxbench.demo.models import weight_files
from tests.vllm.conftest import References
from tests.vllm.engines import EngineHost


@pytest.fixture(scope="module")
def ask(_source_host: EngineHost, model_paths: dict[str, Path]) -> Any:
    def asked(
        model: Path | None = None, kind: str = "processed", environ: dict[str, str] | None = None, **options: Any
    ) -> dict[str, Any]:
        path = str(model or model_paths["llama"])
        return _source_host.ask("identity", model=path, kind=kind, environ=environ or {}, options=options)

    return asked


def test_the_fields(ask: Any, model_paths: dict[str, Path]) -> None:
    identity = ask()["identity"]
    assert identity["mx_version"] == "mx-2"
    assert identity["model_name"] == str(model_paths["llama"])
    assert identity["backend_framework"] == "BACKEND_FRAMEWORK_VLLM"
    assert (identity["tensor_parallel_size"], identity["pipeline_parallel_size"]) == (1, 1)
    assert "expert_parallel_size" not in identity
    assert identity["dtype"] == "bfloat16"
    assert identity["revision"] == "r1"
    assert identity["torch_version"] == torch.__version__
    assert identity["backend_framework_version"]
    assert identity["extra_parameters"]["layout"] == "processed"
    assert len(identity["extra_parameters"]["checkpoint"]) == 16


def test_the_same_settings_give_the_same_id(ask: Any) -> None:
    assert ask() == ask()
    assert ask(max_model_len=64)["source_id"] == ask()["source_id"]


@pytest.mark.parametrize(
    "options",
    [
        {"kind": "raw"},
        {"dtype": "float32"},
        {"kv_cache_dtype": "fp8_e5m2"},
        {"hf_overrides": {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}}},
        {"environ": {"VLLM_CPU_SGL_KERNEL": "1"}},
    ],
)
def test_what_changes_the_weights_changes_the_id(ask: Any, options: dict[str, Any]) -> None:
    assert ask(**options)["source_id"] != ask()["source_id"]


def test_raw_weights_do_not_depend_on_the_engine(ask: Any) -> None:
    identity = ask(kind="raw")["identity"]
    versions = ("backend_framework_version", "torch_version", "cuda_version", "gpu_arch")
    assert not identity.keys() & set(versions)
    assert identity["extra_parameters"]["engine"] == ""


def test_raw_weights_depend_on_what_changes_their_meaning(ask: Any) -> None:
    """Rotary caches travel with them."""
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}}
    assert ask(kind="raw", hf_overrides=rope)["source_id"] != ask(kind="raw")["source_id"]
    assert ask(kind="raw", dtype="float32")["source_id"] != ask(kind="raw")["source_id"]


def test_raw_weights_do_not_depend_on_kernels(ask: Any) -> None:
    environ = {"VLLM_CPU_SGL_KERNEL": "1"}
    assert ask(kind="raw", environ=environ)["source_id"] == ask(kind="raw")["source_id"]


def test_a_variable_set_to_its_default_is_one_that_is_not_set(ask: Any) -> None:
    assert ask(environ={"VLLM_USE_DEEP_GEMM": "1", "VLLM_BATCH_INVARIANT": "0"})["source_id"] == ask()["source_id"]


COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_the_same_checkpoint_at_three_paths_is_one(
    source: EngineHost, target: EngineHost, references: References, model_paths: dict[str, Path], tmp_path: Path
) -> None:
    """MX_MODEL_NAME_OVERRIDE and MX_MODEL_REVISION where the folders differ; the hub's cache needs neither."""
    llama = model_paths["llama"]
    named = {"model_name_override": "org/name", "model_revision": COMMIT}
    first = source.load(llama, extra=named)
    assert (first.report["path"], first.report["serving"]) == ("storage", True)
    hub = tmp_path / "models--org--name" / "snapshots" / COMMIT
    for path, extra in ((tmp_path / "copy", named), (hub, {})):
        shutil.copytree(llama, path)
        loaded = target.load(path, extra=extra)
        assert loaded.answers == first.answers == references.of(llama)
        assert (loaded.report["path"], loaded.report["fallbacks"]) == ("p2p", [])
        assert loaded.report["source_id"] == first.report["source_id"]
        target.ask("leave")


def test_a_checkpoint_that_differs_in_one_byte_is_another(
    ask: Any, model_paths: dict[str, Path], tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(model_paths["llama"], copy)
    same = ask(copy)["identity"]["extra_parameters"]
    assert same == ask()["identity"]["extra_parameters"]

    shard = weight_files(copy)[0]
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert ask(copy)["identity"]["extra_parameters"]["checkpoint"] != same["checkpoint"]

    shard.unlink()
    assert ask(copy)["identity"]["extra_parameters"]["checkpoint"] == ""

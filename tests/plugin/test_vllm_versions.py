"""vLLM's versions: what the plugin touches of them, against the records of their sources (vllm_interface.json)."""

from __future__ import annotations

import ast
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tools import record_vllm_interface as recorder

ROOT = Path(__file__).parents[2]
RECORDS = recorder.load_records()
LOADER = recorder.LOADER
RELEASES = (
    "0.10",
    "0.11",
    "0.12",
    "0.13",
    "0.14",
    "0.15",
    "0.16",
    "0.18",
    "0.20",
    "0.22",
    "0.25",
    "0.27",
    "0.30",
    "0.33",
)
NAMED_FORMATS = [version for version in RECORDS if version != "0.10.0"]  # the first ones that can be registered

# What compat asks for with hasattr or getattr, so that a version may lack it.
OPTIONAL = {
    f"{LOADER}:register_model_loader",
    f"{LOADER}:_LOAD_FORMAT_TO_MODEL_LOADER",
    f"{LOADER}.weight_utils:should_skip_weight",
    "vllm.model_executor.utils:weights_already_processed",
    "vllm.config:ModelConfig.get_num_experts",
    "vllm.config:ParallelConfig.expert_placement_strategy",
    "vllm.config:ParallelConfig.prefill_context_parallel_size",
    "vllm.distributed.parallel_state:get_pcp_group",
    "vllm.config:VllmConfig.attention_config",
    "vllm.config:VllmConfig.kernel_config",
    "vllm.config:CacheConfig.calculate_kv_scales",
    "vllm.v1.worker.gpu_worker:Worker.update_weights",
    "vllm.v1.worker.gpu_worker:Worker.start_weight_update",
    "vllm.v1.worker.gpu_worker:Worker.reset_weights",
    "vllm.v1.worker.gpu_worker:Worker.shutdown",
}


def imports_of_the_plugin() -> Iterator[tuple[str, str, str]]:
    """File, module and name of each `from vllm… import …`."""
    for file in sorted((ROOT / "vllm_plugin").glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
                for alias in node.names:
                    yield file.name, node.module or "", alias.name


def parameters_of_ours(name: str) -> list[str]:
    tree = ast.parse((ROOT / "vllm_plugin" / "loader.py").read_text())
    methods = {
        node.name: recorder.parameters(node.args)
        for kind in ast.walk(tree)
        if isinstance(kind, ast.ClassDef) and kind.name == "MxModelLoader"
        for node in kind.body
        if isinstance(node, ast.FunctionDef)
    }
    return methods[name]


def test_the_releases_that_people_run_are_recorded() -> None:
    for release in RELEASES:
        assert any(version.startswith(f"{release}.") for version in RECORDS), release


def test_whatever_the_plugin_imports_is_recorded() -> None:
    modules = {key.split(":")[0] for key in recorder.TOUCHED}
    for file, module, name in imports_of_the_plugin():
        assert f"{module}:{name}" in recorder.TOUCHED or f"{module}.{name}" in modules, f"{file}: {module}.{name}"


@pytest.mark.parametrize("version", RECORDS)
def test_nothing_is_missing_that_is_not_asked_for_first(version: str) -> None:
    missing = {key for key, shape in RECORDS[version].items() if shape is None}
    assert missing <= OPTIONAL


def test_nothing_counts_as_optional_that_all_versions_have() -> None:
    always = {key for key in OPTIONAL if all(record[key] is not None for record in RECORDS.values())}
    assert always == set()


@pytest.mark.parametrize("version", RECORDS)
@pytest.mark.parametrize("name", ["load_model", "load_weights", "download_model"])
def test_our_loader_takes_what_vllm_gives(version: str, name: str) -> None:
    theirs = RECORDS[version][f"{LOADER}.base_loader:BaseModelLoader.{name}"]
    assert isinstance(theirs, list)
    ours = parameters_of_ours(name)
    assert ours[: len(theirs)] == theirs
    assert all(parameter.endswith("=") for parameter in ours[len(theirs) :])


@pytest.mark.parametrize("version", RECORDS)
def test_our_loader_reloads_as_the_default_loader(version: str) -> None:
    theirs = RECORDS[version][f"{LOADER}.default_loader:DefaultModelLoader.get_all_weights"]
    assert parameters_of_ours("get_all_weights") == theirs


@pytest.mark.parametrize("version", RECORDS)
def test_the_iterator_over_weight_files(version: str) -> None:
    """compat.wanted_names and StorageLoader read its arguments by place: tqdm first, experts third."""
    record = RECORDS[version]
    assert record[f"{LOADER}.default_loader:DefaultModelLoader._get_weights_iterator"] == ["self", "source"]
    parameters = record[f"{LOADER}.default_loader:safetensors_weights_iterator"]
    assert isinstance(parameters, list)
    assert parameters[:2] == ["hf_weights_files", "use_tqdm_on_load"]
    skips = record[f"{LOADER}.weight_utils:should_skip_weight"]
    assert ("local_expert_ids=" in parameters) == (skips is not None)
    if skips is not None:
        assert parameters[3] == "local_expert_ids="
        assert skips == ["weight_name", "local_expert_ids"]


@pytest.mark.parametrize("version", RECORDS)
def test_building_and_processing(version: str) -> None:
    record = RECORDS[version]
    processing = record[f"{LOADER}.utils:process_weights_after_loading"]
    assert processing == ["model", "model_config", "target_device"]
    assert record[f"{LOADER}.utils:initialize_model"][:1] == ["vllm_config"]  # type: ignore[index]


@pytest.mark.parametrize("version", NAMED_FORMATS)
def test_load_formats_can_be_registered(version: str) -> None:
    assert RECORDS[version][f"{LOADER}:register_model_loader"] == ["load_format"]
    assert RECORDS[version][f"{LOADER}:_LOAD_FORMAT_TO_MODEL_LOADER"] == "there"


@pytest.mark.parametrize("version", RECORDS)
def test_the_workers_whose_sleep_is_watched(version: str) -> None:
    for worker in ("gpu_worker:Worker", "cpu_worker:CPUWorker", "xpu_worker:XPUWorker"):
        assert RECORDS[version][f"vllm.v1.worker.{worker}.sleep"] == ["self", "level="]
        assert RECORDS[version][f"vllm.v1.worker.{worker}.wake_up"] == ["self", "tags="]


SOURCE = {
    "vllm/__init__.py": "from .config import *\n",
    "vllm/config/__init__.py": "from vllm.config.load import LoadConfig as LoadConfig\n",
    "vllm/config/load.py": """
from .base import Base
class LoadConfig(Base):
    load_format: str = "auto"
    @property
    def device(self): ...
    def __init__(self, one, /, two=1, *rest, three, four=2, **more):
        self.seen = 1
""",
    "vllm/config/base.py": "class Base:\n    download_dir = None\n    def ask(self, *, loud): ...\n",
    "vllm/model_executor/utils.py": "try:\n    def weights_already_processed(): ...\nexcept E:\n    pass\n",
}


@pytest.fixture
def sources(tmp_path: Path) -> recorder.Sources:
    wheel = tmp_path / "vllm.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in SOURCE.items():
            archive.writestr(name, text)
    return recorder.Sources.at(wheel)


def test_recorder_follows_re_exports_and_bases(sources: recorder.Sources) -> None:
    shapes = recorder.record(sources)
    assert shapes["vllm.config:LoadConfig"] == "there"
    assert shapes["vllm.config:LoadConfig.load_format"] == "there"
    assert shapes["vllm.config:LoadConfig.device"] == "there"
    assert shapes["vllm.config:LoadConfig.download_dir"] == "there"
    assert shapes["vllm.config:LoadConfig.model_loader_extra_config"] is None
    assert shapes["vllm.model_executor.utils:weights_already_processed"] == []
    assert shapes["vllm.v1.worker.gpu_worker:Worker.sleep"] is None


def test_recorder_reads_parameters(sources: recorder.Sources) -> None:
    found = sources.find("vllm", "LoadConfig")
    assert found is not None
    init, ask = sources.attribute(found, "__init__"), sources.attribute(found, "ask")
    assert isinstance(init, ast.FunctionDef)
    assert isinstance(ask, ast.FunctionDef)
    assert recorder.parameters(init.args) == ["self", "one", "two=", "*rest", "three", "four=", "**more"]
    assert recorder.parameters(ask.args) == ["self", "*", "loud"]
    assert sources.attribute(found, "seen") is not None


def test_recorder_says_what_is_no_vllm(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no package vllm"):
        recorder.Sources.at(tmp_path)


def test_records_survive_writing(tmp_path: Path) -> None:
    path = tmp_path / "records.json"
    recorder.write_records(RECORDS, dict.fromkeys(RECORDS, "x.whl"), path)
    assert recorder.load_records(path) == RECORDS
    assert list(recorder.load_records(path)) == list(RECORDS)

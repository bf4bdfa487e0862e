"""The record of the installed vLLM is what that vLLM really is."""

from __future__ import annotations

from importlib.metadata import version

from tests.vllm.engines import EngineHost
from tools.record_vllm_interface import load_records


def test_the_installed_version_equals_its_record(source: EngineHost) -> None:
    record = load_records()[version("vllm").split("+")[0]]
    keys = [key for key in record if "xpu_worker" not in key]  # that module needs a library of Intel's

    live = source.ask("interface", keys=keys)["shapes"]

    of_instances = {"vllm.config:ModelConfig.runner_type"}
    differing = {key: (record[key], live[key]) for key in keys if record[key] != live[key]}
    assert not differing.keys() - of_instances, differing

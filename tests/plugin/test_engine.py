"""What vLLM is to `mxcore.engine`: what a load format makes of a worker, how many hold one copy of a model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]

PROGRAM = """
import inspect, json, types
import torch
from vllm.config import LoadConfig
from mxcore.engine import Engine
from vllm_plugin import compat
from vllm_plugin.engine import VllmEngine, role_of
from vllm_plugin.ray_variables import lost_by_ray

names = ("mx", "mx-source", "mx-target", "modelexpress")
found = {"roles": {name: [*role_of(name)[:4], role_of(name).is_fixed] for name in names}}
found["a class"] = role_of(object).load_format
found["advice"] = [bool(role_of(name).otherwise) for name in names]

class Config(types.SimpleNamespace):  # as vLLM's, one that can be held weakly
    pass

def parallel(tp, pp, dp, ep):
    return types.SimpleNamespace(parallel_config=types.SimpleNamespace(
        tensor_parallel_size=tp, pipeline_parallel_size=pp, data_parallel_size=dp, enable_expert_parallel=ep))

class Dense:
    def __init__(self, **settings): self.hf_config = types.SimpleNamespace(to_dict=lambda: settings)

class Counting(Dense):
    def __init__(self, count): super().__init__(); self.get_num_experts = lambda: count

sizes = ((1, 1, 1, False), (2, 3, 4, False), (2, 3, 4, True))
found["world"] = [[compat.world_size(parallel(*each), model) for each in sizes] for model in (Dense(), Counting(8))]
models = Dense(), Dense(num_experts=0, num_experts_per_tok=None), Dense(moe_num_experts=4), Counting(0), Counting(8)
found["experts"] = [compat.has_experts(model) for model in models]

ray = types.SimpleNamespace(parallel_config=types.SimpleNamespace(distributed_executor_backend="ray"))
copied = "VLLM_RAY_EXTRA_ENV_VAR_PREFIXES_TO_COPY"
environs = {}, {copied: "OTHER_, MX_"}, {copied: "MX_,MODEL_EXPRESS_"}, {"MODEL_EXPRESS_URL": "h:1"}
found["lost"] = [lost_by_ray(ray, environ) for environ in environs]
found["lost elsewhere"] = lost_by_ray(parallel(1, 1, 1, False), {})

kernels = lambda name: name.startswith("VLLM_")
texts = (
    {}, {"OTHER": "1"}, {"VLLM_USE_DEEP_GEMM": "1"}, {"VLLM_USE_DEEP_GEMM": "0"},
    {"VLLM_BATCH_INVARIANT": "0"}, {"VLLM_BATCH_INVARIANT": "1"}, {"VLLM_DISABLED_KERNELS": "a,b"},
    {"VLLM_NOBODY_KNOWS": "1"}, {"VLLM_FLASHINFER_WORKSPACE_BUFFER_SIZE": "many"})
found["variables"] = [compat.chosen_variables(environ, kernels) for environ in texts]

here = Config(
    load_config=types.SimpleNamespace(device=None), device_config=types.SimpleNamespace(device="cpu"), instance_id="e1",
    parallel_config=types.SimpleNamespace(local_world_size=2, tensor_parallel_size=4, pipeline_parallel_size=1))
before = Config(**{**vars(here), "parallel_config": types.SimpleNamespace(
    tensor_parallel_size=4, pipeline_parallel_size=2)})
options = {"layout": "raw"}
load_config = LoadConfig(load_format="mx", model_loader_extra_config=options)

def engine(config=here, quantization=None):
    model = types.SimpleNamespace(model="m", revision="r", quantization=quantization)
    return VllmEngine(load_config, config, model, "")

made = engine()
found["engine"] = [made.model, made.revision, made.download_dir, str(made.device), made.accelerator, made.instance,
                   made.processed_weights_move, dict(made.options), made.barrier(1.0)]
found["node"] = [engine().ranks_on_node(), engine(before).ranks_on_node()]
layer = torch.nn.Linear(2, 2)
torch.nn.init.ones_(layer.weight)
found["placeholder"] = []
for quantization in (None, "fp8"):
    engine(quantization=quantization).fill_placeholder(layer)
    found["placeholder"].append(layer.weight.flatten().tolist())
methods = {name: member for name, member in vars(Engine).items() if inspect.isfunction(member) and name[0] != "_"}
found["methods"] = sorted(methods)
found["same"] = [inspect.signature(getattr(VllmEngine, name)) == inspect.signature(methods[name]) for name in methods]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    answers: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return answers


def test_who_does_what(found: dict[str, Any]) -> None:
    """Pulls, reads storage, offers, has a fixed role."""
    assert found["roles"] == {
        "mx": ["mx", True, True, True, False],
        "mx-source": ["mx-source", False, True, True, True],
        "mx-target": ["mx-target", True, False, False, True],
        "modelexpress": ["mx", True, True, True, False],
    }
    assert found["a class"] == "mx"
    assert found["advice"] == [False, False, True, False]


def test_how_many_ranks_there_are(found: dict[str, Any]) -> None:
    assert found["world"] == [[1, 6, 6], [1, 24, 24]]  # experts are split over replicas too
    assert found["experts"] == [False, False, True, False, True]
    assert found["node"] == [2, 8]  # before vLLM had engines over several nodes without Ray, all are here


def test_vllm_is_what_the_protocol_asks_for(found: dict[str, Any]) -> None:
    """On the CPU build, one worker alone."""
    assert found["engine"] == ["m", "r", None, "cpu", "cpu", "e1", False, {"layout": "raw"}, ""]
    assert "fill_placeholder" in found["methods"]
    assert all(found["same"])


def test_only_quantisation_needs_values_before_processing(found: dict[str, Any]) -> None:
    assert found["placeholder"] == [[1.0] * 4, [2.0**-6] * 4]


def test_rays_workers_without_our_variables_say_which_one_is_missing(found: dict[str, Any]) -> None:
    nothing, half, both, here = found["lost"]
    assert "MX_* and MODEL_EXPRESS_*" in nothing
    assert "set VLLM_RAY_EXTRA_ENV_VAR_PREFIXES_TO_COPY=MX_,MODEL_EXPRESS_" in nothing
    assert "variables MODEL_EXPRESS_*:" in half
    assert (both, here, found["lost elsewhere"]) == ("", "", "")


def test_a_variable_counts_by_what_vllm_makes_of_it(found: dict[str, Any]) -> None:
    """One that is set to its default is as one that is not set; by vLLM's own functions, for no list of ours stays."""
    assert found["variables"] == [
        {},
        {},
        {},
        {"VLLM_USE_DEEP_GEMM": False},
        {},
        {"VLLM_BATCH_INVARIANT": True},
        {"VLLM_DISABLED_KERNELS": ["a", "b"]},
        {"VLLM_NOBODY_KNOWS": "1"},
        {"VLLM_FLASHINFER_WORKSPACE_BUFFER_SIZE": "many"},
    ]

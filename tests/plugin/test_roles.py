"""What a load format makes of a worker, and how many workers hold one copy of a model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]

PROGRAM = """
import json, types
from vllm_plugin import compat
from vllm_plugin.engine import VllmEngine, role_of

names = ("mx", "mx-source", "mx-target", "modelexpress")
found = {"roles": {name: [*role_of(name)[:4], role_of(name).is_fixed] for name in names}}
found["a class"] = role_of(object).load_format
found["advice"] = [bool(role_of(name).otherwise) for name in names]

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
found["barrier"] = VllmEngine.barrier(None, 1.0)
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
    assert found["barrier"] == ""  # one worker alone

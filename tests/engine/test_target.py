"""Fixed roles without an engine: who does what, bounded waits, a target's tries."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]

PROGRAM = """
import json, logging, types
from mxcore.errors import LayoutMismatch, LayoutUnsupported, SourceRefused, SourceUnreachable
from mxcore.load_ladder import Ladder
from mxcore.settings import load_settings
from mxserver.wire.errors import ServerUnreachable
from vllm_plugin import compat, roles, rungs, target_rung
from vllm_plugin.roles import Wait, role_of, wait_for_ranks
from vllm_plugin.target_rung import TargetRung, rungs_of

class Clock:
    def __init__(self): self.seconds, self.pauses = 1000.0, 0
    def now(self): return self.seconds
    def sleep(self, seconds): self.seconds += seconds; self.pauses += 1

lines = []
handler = logging.Handler()
handler.emit = lambda record: lines.append(record.getMessage())
logging.getLogger("vllm_plugin.roles").addHandler(handler)
logging.getLogger("vllm_plugin.roles").setLevel(logging.INFO)

names = ("mx", "mx-source", "mx-target", "modelexpress")
found = {"roles": {name: [*role_of(name), role_of(name).is_fixed] for name in names}}
found["a class"] = role_of(Clock).load_format

clock = Clock()
wait = Wait("a source", 65.5, now=clock.now, sleep=clock.sleep)
while wait.pause(): pass
found["waited"] = [clock.seconds - 1000.0, clock.pauses, lines[:]]

class Ranks:
    def __init__(self, *answers): self.answers, self.asked = list(answers), []
    def published_ranks(self, ready):
        self.asked.append(ready)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception): raise answer
        return answer

def ranks(membership, limit=10.0):
    clock = Clock()
    wait = Wait("ranks", limit, now=clock.now, sleep=clock.sleep)
    return wait_for_ranks(membership, wait, 2, ready=True), clock.pauses

found["ranks"] = [ranks(Ranks({0}, ServerUnreachable("away"), {0, 1})), ranks(Ranks({0}))]

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
found["barrier"] = compat.world_barrier(1.0)

class Load:
    def __init__(self, role, sources, **settings):
        self.role, self.kind, self.settings = role, "raw", load_settings(settings, {})
        self.report = types.SimpleNamespace(rank=0)
        self.membership, self.alone, self.cannot_receive = self, "alone", ""
        self.any_checkpoint, self.avoid, self.sources = False, set(), sources
        self.vllm_config, self.model_config = parallel(1, 1, 1, False), Dense()
    def what(self): return "raw weights of m, rank 0"
    def find_sources(self, **kwargs):
        answer = self.sources.pop(0) if len(self.sources) > 1 else self.sources[0]
        return [types.SimpleNamespace(worker_id=name, receiving=False) for name in answer]
    def published_ranks(self, ready): return {0}
    def forget_model(self): pass
    def attempt(self, what, function): pass
    def withdraw(self): pass

clocks = []
class Quick(Wait):
    def __init__(self, what, limit):
        clock = Clock()
        clocks.append(clock)
        super().__init__(what, limit, now=clock.now, sleep=clock.sleep)

target_rung.Wait = Quick

def climbed(load, *results):
    outcomes, tried = list(results), []
    def load_model(self):
        tried.append([source.worker_id for source in self._sources])
        outcome = outcomes.pop(0)
        if isinstance(outcome, Exception):
            if not isinstance(outcome, LayoutUnsupported):
                self._load.avoid.update(source.worker_id for source in self._sources); self._others_may_do = True
            raise outcome
        return outcome
    rungs.PeerRung.load = load_model
    ladder = Ladder(rungs_of(load))
    try:
        return [ladder.climb(), tried]
    except Exception as error:
        return [type(error).__name__, tried, ladder.steps[-1].reason]

target = roles.MX_TARGET
found["rungs"] = {
    role.load_format: [type(rung).__name__ for rung in rungs_of(Load(role, [[]]))]
    for role in (roles.MX, roles.MX_SOURCE, target)
}
found["default wait"] = TargetRung(Load(target, [[]]))._limit_seconds
found["comes late"] = climbed(Load(target, [[], [], ["a"]]), "model")
found["never comes"] = climbed(Load(target, [[]], source_wait_seconds=3))
found["same again"] = climbed(Load(target, [["a"]]), SourceUnreachable("gone"), "model")
found["refuses for long"] = [*climbed(Load(target, [["a"]]), *[SourceRefused("no")] * 5, "model"), clocks[-1].pauses]
found["another layout"] = climbed(Load(target, [["a"], ["a"], ["a", "b"]]), LayoutMismatch("names"), "model")
found["only another layout"] = climbed(Load(target, [["a"]], source_wait_seconds=2), LayoutMismatch("names differ"))
found["cannot move"] = climbed(Load(target, [["a"]]), LayoutUnsupported("opaque"))
found["together"] = climbed(Load(target, [["a"]], sync_start="1"), "model")
settings = {"sync_start": "1", "expected_workers": 2, "source_wait_seconds": 2}
found["not together"] = climbed(Load(target, [["a"]], **settings), "model")
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


def test_the_rungs_of_each_role(found: dict[str, Any]) -> None:
    rungs = found["rungs"]
    assert rungs["mx-target"] == ["TargetRung"]
    assert rungs["mx"][:2] == ["PeerRung", "FleetRung"]
    assert rungs["mx-source"] == rungs["mx"][2:]


def test_a_wait_is_bounded_and_says_what_for_every_half_minute(found: dict[str, Any]) -> None:
    waited, pauses, lines = found["waited"]
    assert (waited, pauses) == (65.5, 66)
    assert lines == [
        "waiting for a source, at most 65.5 s",
        "still waiting for a source: 30 of 65.5 s",
        "still waiting for a source: 60 of 65.5 s",
    ]


def test_ranks_are_waited_for(found: dict[str, Any]) -> None:
    """Through a server that is away for a moment; and not for ever."""
    assert found["ranks"] == [[True, 2], [False, 10]]


def test_how_many_ranks_there_are(found: dict[str, Any]) -> None:
    assert found["world"] == [[1, 6, 6], [1, 24, 24]]  # experts are split over replicas too
    assert found["experts"] == [False, False, True, False, True]
    assert found["barrier"] == ""  # one worker alone


def test_a_target_takes_a_source_that_comes_late(found: dict[str, Any]) -> None:
    assert found["default wait"] == 7200
    assert found["comes late"] == ["model", [["a"]]]


def test_a_target_gives_up_when_the_time_is_over(found: dict[str, Any]) -> None:
    error, tried, reason = found["never comes"]
    assert (error, tried) == ("LoadPathsExhausted", [])
    assert reason == "no source is there within 3 s (MX_SOURCE_WAIT_SECS)"


def test_a_target_tries_again(found: dict[str, Any]) -> None:
    assert found["same again"] == ["model", [["a"], ["a"]]]


def test_a_target_tries_less_often_where_that_goes_on_failing(found: dict[str, Any]) -> None:
    assert found["refuses for long"] == ["model", [["a"]] * 6, 1 + 2 + 4 + 8 + 8]


def test_a_source_with_another_layout_is_not_asked_twice(found: dict[str, Any]) -> None:
    assert found["another layout"] == ["model", [["a"], ["b"]]]
    error, tried, reason = found["only another layout"]
    assert (error, tried) == ("LoadPathsExhausted", [["a"]])
    assert "the last transfer failed: names differ" in reason


def test_weights_that_cannot_move_end_the_wait(found: dict[str, Any]) -> None:
    error, tried, reason = found["cannot move"]
    assert (error, tried) == ("LoadPathsExhausted", [["a"]])
    assert "cannot be taken from a worker" in reason


def test_ranks_begin_together(found: dict[str, Any]) -> None:
    assert found["together"] == ["model", [["a"]]]
    error, tried, reason = found["not together"]
    assert (error, tried) == ("LoadPathsExhausted", [])
    assert "not all 2 ranks have a source (MX_SYNC_START) within 2 s" in reason

"""What the engine does to weights, heard of through its worker class; and what becomes of offers then."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mxcore.engine import serving
from mxcore.engine.departure import Record
from mxserver.wire import MxError

ROOT = Path(__file__).parents[2]

PROGRAM = """
import json, sys, types
from vllm.config import VllmConfig
from vllm.config.utils import is_init_field
from vllm_plugin import compat

told, done = [], []

class Base:
    def sleep(self, level=1): done.append(["sleep", level]); return "slept"
    def wake_up(self, tags=None, **later): done.append(["wake_up", tags])
    def discard(self, tags): done.append(["discard", tags])
    def reload_weights(self, *args, **kwargs): done.append(["reload_weights", len(args)])

class Worker(Base):
    def sleep(self, level=1): return super().sleep(level)
    def update_weights(self, info): raise KeyError("the engine's own")
    def shutdown(self): done.append(["shutdown", None])

class Watch:
    def sleeping(self, engine, level): told.append(["sleeping", engine, level]); raise ValueError("a fault of ours")
    def awake(self, engine, tags): told.append(["awake", engine, tags, list(done[-1])])
    def changing(self, engine, what): told.append(["changing", engine, what])
    def ending(self, engine): told.append(["ending", engine])

module = sys.modules["workers"] = types.ModuleType("workers")
module.Worker, module.Other = Worker, object
def config(name, **parallel):
    return types.SimpleNamespace(parallel_config=types.SimpleNamespace(worker_cls=name, **parallel))

found = {
    "twice": [compat.watch_worker(config("workers.Worker"), Watch()) for _ in range(2)],
    "others": [compat.watch_worker(config(name), Watch()) for name in ("auto", "workers.Other", "nowhere.Worker")],
}
worker = Worker()
found["result"] = worker.sleep(level=1)
worker.wake_up(["weights"])
worker.wake_up(["weights"], a_later_vllms="own")
worker.discard(["kv_cache"])
worker.reload_weights(1, x=2)
try:
    worker.update_weights({})
except KeyError as error:
    found["raised"] = str(error)
worker.vllm_config = type("Config", (), {"instance_id": "e1"})()
compat.engine_of(worker.vllm_config)
worker.vllm_config.instance_id = "another"  # as `vllm serve` does it once the engine has loaded
worker.shutdown()
real = VllmConfig()
copies = VllmConfig(compilation_config=real.compilation_config), VllmConfig()  # as vLLM copies; of another engine
found["same"] = [compat.engine_of(each) == compat.engine_of(real) for each in copies]
found["copies"] = [compat.engine_of(real) != "", bool([is_init_field(VllmConfig, name) for name in vars(real)])]
sleeps = types.SimpleNamespace(enable_sleep_mode=True)
found["risks"] = [
    compat.may_lose_memory(config("workers.Worker"), sleeps),
    compat.may_lose_memory(config("workers.Other"), sleeps),
    compat.may_lose_memory(config("workers.Worker", enable_eplb=True), types.SimpleNamespace()),
]
print(json.dumps({**found, "told": told, "done": done, "platform": compat.platform_worker().__name__}))
"""


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    answers: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return answers


def test_each_call_is_heard_of_once_and_in_order(found: dict[str, Any]) -> None:
    assert found["twice"] == [True, True]
    assert found["told"] == [
        ["sleeping", "", 1],
        ["changing", "", "sleep, called in a way that is not known here"],
        ["awake", "", ["weights"], ["wake_up", ["weights"]]],
        ["changing", "", "wake_up, called in a way that is not known here"],
        ["changing", "", "discard"],
        ["changing", "", "reload_weights"],
        ["changing", "", "update_weights"],
        ["ending", "e1"],
    ]


def test_the_engine_goes_on_as_without_us(found: dict[str, Any]) -> None:
    """Also when our part fails (it does at `sleep`); what the engine raises stays what it is."""
    assert found["done"] == [
        ["sleep", 1],
        ["wake_up", ["weights"]],
        ["wake_up", ["weights"]],
        ["discard", ["kv_cache"]],
        ["reload_weights", 1],
        ["shutdown", None],
    ]
    assert found["result"] == "slept"
    assert found["raised"] == '"the engine\'s own"'


def test_a_configuration_that_was_asked_for_its_engine_can_be_copied(found: dict[str, Any]) -> None:
    """vLLM does so for a part of a model, such as the language model of one that sees, and for a draft.

    It asks of each attribute whether it is a field, and raises for one that is none.
    """
    assert found["copies"] == [True, True]
    assert found["same"] == [True, False]  # drafts are loaded with copies


def test_a_worker_that_cannot_be_watched(found: dict[str, Any]) -> None:
    assert found["others"] == [False, False, False]
    watched, unwatched, balancing = found["risks"]
    assert watched is None
    assert "sleep mode" in unwatched
    assert balancing is None  # its moves are watched


def test_the_platforms_worker(found: dict[str, Any]) -> None:
    assert found["platform"] == "CPUWorker"


class Member:
    """Records its calls; `still` is what `resume` says, or raises."""

    def __init__(self, still: bool | MxError = True) -> None:
        self.still = still
        self.calls: list[str] = []

    def pause(self) -> bool:
        self.calls.append("pause")
        return True

    def resume(self) -> bool:
        self.calls.append("resume")
        if isinstance(self.still, MxError):
            raise self.still
        return self.still

    def close(self) -> None:
        self.calls.append("close")


@pytest.fixture
def staying() -> Iterator[Any]:
    def stay(member: Member, engine: str = "e1") -> Member:
        serving.stay(member, Record("127.0.0.1:1", "s", "w", 0), engine)
        return member

    yield stay
    serving.leave("the test ends")


def test_an_offer_is_paused_and_resumed(staying: Any) -> None:
    member, watch = staying(Member()), serving.EngineWatch()
    watch.sleeping("e1", 1)
    watch.awake("e1", ["kv_cache"])
    assert member.calls == ["pause"]
    watch.awake("e1", ["weights"])
    assert member.calls == ["pause", "resume"]
    assert serving.leave("done") == 1


@pytest.mark.parametrize("still", [False, MxError("no agent")])
def test_an_offer_that_cannot_be_resumed_ends(staying: Any, still: Any) -> None:
    member, watch = staying(Member(still)), serving.EngineWatch()
    watch.sleeping("e1", 1)
    watch.awake("e1", None)
    assert member.calls == ["pause", "resume", "close"]
    assert serving.leave("done") == 0


@pytest.mark.parametrize("event", ["deep sleep", "change", "end"])
def test_what_ends_an_offer(staying: Any, event: str) -> None:
    member, watch = staying(Member()), serving.EngineWatch()
    if event == "deep sleep":
        watch.sleeping("e1", 2)
    elif event == "change":
        watch.changing("e1", "update_weights")
    else:
        watch.ending("e1")
    watch.awake("e1", None)
    assert member.calls == ["close"]


def test_what_one_engine_does_leaves_the_others_offers_alone(staying: Any) -> None:
    one, other, watch = staying(Member()), staying(Member(), "e2"), serving.EngineWatch()
    watch.sleeping("e2", 1)
    watch.awake("e2", None)
    watch.ending("e1")
    assert one.calls == ["close"]
    assert other.calls == ["pause", "resume"]


def test_what_an_unknown_engine_does_ends_all_offers(staying: Any) -> None:
    """Better to serve too little than what may be gone."""
    members = [staying(Member()), staying(Member(), "e2"), staying(Member(), "")]
    serving.EngineWatch().ending("")
    assert [member.calls for member in members] == [["close"]] * 3


def test_an_engine_that_offers_nothing_ends_what_may_be_its_own_and_nobody_elses(staying: Any) -> None:
    one, of_nobody = staying(Member()), staying(Member(), "")
    serving.EngineWatch().ending("e3")
    assert one.calls == []
    assert of_nobody.calls == ["close"]

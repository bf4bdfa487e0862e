"""What the engine does to weights, heard of through its worker class; and what becomes of offers then."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mxserver.wire.errors import MxError
from vllm_plugin import serving
from vllm_plugin.last_will import Record

ROOT = Path(__file__).parents[2]

PROGRAM = """
import json, sys, types
from vllm_plugin import compat

told, done = [], []

class Base:
    def sleep(self, level=1): done.append(["sleep", level]); return "slept"
    def wake_up(self, tags=None): done.append(["wake_up", tags])
    def reload_weights(self, *args, **kwargs): done.append(["reload_weights", len(args)])

class Worker(Base):
    def sleep(self, level=1): return super().sleep(level)
    def update_weights(self, info): raise KeyError("the engine's own")
    def shutdown(self): done.append(["shutdown", None])

class Watch:
    def sleeping(self, level): told.append(["sleeping", level]); raise ValueError("a fault of ours")
    def awake(self, tags): told.append(["awake", tags, list(done[-1])])
    def changing(self, what): told.append(["changing", what])
    def ending(self): told.append(["ending", None])

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
worker.reload_weights(1, x=2)
try:
    worker.update_weights({})
except KeyError as error:
    found["raised"] = str(error)
worker.shutdown()
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
        ["sleeping", 1],
        ["awake", ["weights"], ["wake_up", ["weights"]]],
        ["changing", "reload_weights"],
        ["changing", "update_weights"],
        ["ending", None],
    ]


def test_the_engine_goes_on_as_without_us(found: dict[str, Any]) -> None:
    """Also when our part fails (it does at `sleep`); what the engine raises stays what it is."""
    assert found["done"] == [["sleep", 1], ["wake_up", ["weights"]], ["reload_weights", 1], ["shutdown", None]]
    assert found["result"] == "slept"
    assert found["raised"] == '"the engine\'s own"'


def test_a_worker_that_cannot_be_watched(found: dict[str, Any]) -> None:
    assert found["others"] == [False, False, False]
    watched, unwatched, balancing = found["risks"]
    assert watched is None
    assert "sleep mode" in unwatched
    assert "expert load balancing" in balancing


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
    def stay(member: Member) -> Member:
        serving.stay(member, Record("127.0.0.1:1", "s", "w", 0))
        return member

    yield stay
    serving.leave("the test ends")


def test_an_offer_is_paused_and_resumed(staying: Any) -> None:
    member, watch = staying(Member()), serving.EngineWatch()
    watch.sleeping(1)
    watch.awake(["kv_cache"])
    assert member.calls == ["pause"]
    watch.awake(["weights"])
    assert member.calls == ["pause", "resume"]
    assert serving.leave("done") == 1


@pytest.mark.parametrize("still", [False, MxError("no agent")])
def test_an_offer_that_cannot_be_resumed_ends(staying: Any, still: Any) -> None:
    member, watch = staying(Member(still)), serving.EngineWatch()
    watch.sleeping(1)
    watch.awake(None)
    assert member.calls == ["pause", "resume", "close"]
    assert serving.leave("done") == 0


@pytest.mark.parametrize("event", ["deep sleep", "change", "end"])
def test_what_ends_an_offer(staying: Any, event: str) -> None:
    member, watch = staying(Member()), serving.EngineWatch()
    if event == "deep sleep":
        watch.sleeping(2)
    elif event == "change":
        watch.changing("update_weights")
    else:
        watch.ending()
    watch.awake(None)
    assert member.calls == ["close"]

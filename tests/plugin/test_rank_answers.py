"""What ranks answer after one of them has failed: vLLM's own executor, with queues of the test's.

In a process of its own: the plugin changes vLLM for all of it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]

PROGRAM = """
import collections, json, types
from vllm.v1.executor.multiproc_executor import MultiprocExecutor, WorkerProc

right, wrong = WorkerProc.ResponseStatus.SUCCESS, WorkerProc.ResponseStatus.FAILURE

class Queue(collections.deque):
    def dequeue(self, timeout=None):
        return self.popleft()

def told(call, *answers, **options):
    "What calls give, one after the other: of each call there are both ranks' answers."
    ranks = [Queue(), Queue()]
    executor = types.SimpleNamespace(
        rpc_broadcast_mq=types.SimpleNamespace(enqueue=lambda message: None),
        response_mqs=ranks, is_failed=False, futures_queue=collections.deque(),
    )
    given = []
    for both in answers:
        for rank, answer in zip(ranks, both):
            if answer is not None:
                rank.append(answer)
        try:
            given.append(call(executor, "update_weights", None, (), {}, **options))
        except RuntimeError as error:
            given.append(str(error).split(",")[0])
    return given, executor.response_mqs is ranks, [len(rank) for rank in ranks]

calls = [
    ((wrong, "one"), (wrong, "the other")),
    ((right, "a"), (right, "b")),
    ((right, "c"), (wrong, "d")),
    ((right, "e"), (right, "f")),
]
one_rank = [((right, "a"), None)]
own = MultiprocExecutor.collective_rpc
found = {"before": told(own, *calls), "one_before": told(own, *one_rank, unique_reply_rank=0)}
from vllm_plugin.update import take_all_answers
for _ in range(2):
    take_all_answers()
ours = MultiprocExecutor.collective_rpc
found |= {"after": told(ours, *calls), "one_after": told(ours, *one_rank, unique_reply_rank=0)}
found["once"] = ours.__wrapped__ is own
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


def test_an_answer_belongs_to_the_call_that_was_made(found: dict[str, Any]) -> None:
    (first, *others), *rest = found["after"]
    assert first == "Worker failed with error 'one'"
    assert others == [["a", "b"], "Worker failed with error 'd'", ["e", "f"]]
    assert rest == [True, [0, 0]]
    assert found["once"]


def test_vllm_alone_takes_it_for_that_of_the_next(found: dict[str, Any]) -> None:
    """What the change is for: without it the failure of the last rank is an answer to whatever is asked next."""
    assert found["before"][0][1] == "Worker failed with error 'the other'"


def test_a_call_that_one_rank_answers_is_vllms(found: dict[str, Any]) -> None:
    assert found["one_after"] == found["one_before"] == [["a"], True, [0, 0]]

"""Every rank's answer to a call is taken, also where one of them says that it failed.

vLLM's executor of several processes (0.32) reads the ranks' answers in turn and raises at the first failure. What later
ranks answered stays in their queues, and is taken for answers to the next call. An update fails on all ranks together,
so that after it nothing that ranks say could be believed: whether they are whole, which version they have.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
from typing import Any

__all__ = ["take_all_answers"]

_log = logging.getLogger(__name__)
_OF_EVERY_CALL = ("self", "method", "timeout", "args", "kwargs")  # others: one rank answers, or nobody waits
_LATE_SECONDS = 60.0  # for ranks whose answers nobody waits for any more


def take_all_answers() -> None:
    """Changes vLLM's executor for this process; nothing in a vLLM that has another one. Idempotent."""
    try:
        kind: Any = importlib.import_module("vllm.v1.executor.multiproc_executor").MultiprocExecutor
    except (ImportError, AttributeError):
        return
    has_call = "collective_rpc" in vars(kind) and "non_block" in inspect.signature(kind.collective_rpc).parameters
    if has_call and not hasattr(kind.collective_rpc, "takes_all"):
        kind.collective_rpc = _taking_all(kind.collective_rpc)


class _Answers:
    """One rank's queue, during one call."""

    def __init__(self, queue: Any) -> None:
        self._queue = queue
        self.is_taken = False

    def dequeue(self, *args: Any, **kwargs: Any) -> Any:
        """As the queue's."""
        self.is_taken = True
        return self._queue.dequeue(*args, **kwargs)


def _taking_all(collective_rpc: Any) -> Any:
    parameters = inspect.signature(collective_rpc)

    @functools.wraps(collective_rpc)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = parameters.bind(self, *args, **kwargs).arguments
        queues = getattr(self, "response_mqs", None)
        wants_all = not any(value for name, value in given.items() if name not in _OF_EVERY_CALL)
        if not wants_all or not isinstance(queues, list):
            return collective_rpc(self, *args, **kwargs)
        self.response_mqs = answers = [_Answers(queue) for queue in queues]
        try:
            future = collective_rpc(**{**given, "non_block": True})
        finally:
            self.response_mqs = queues
        try:
            return future.result()
        except RuntimeError:
            _take_rest(answers, str(given.get("method")))
            raise

    call.takes_all = True  # type: ignore[attr-defined]
    return call


def _take_rest(answers: list[_Answers], method: str) -> None:
    """What ranks say after one that failed."""
    for rank, answer in enumerate(answers):
        if not answer.is_taken:
            try:
                answer.dequeue(timeout=_LATE_SECONDS)
            except Exception as error:  # noqa: BLE001 - it is silent, and vLLM says so itself when it is dead
                _log.warning("rank %d has not answered to %s, as another one failed at it: %s", rank, method, error)

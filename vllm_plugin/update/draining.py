"""vLLM's pause that waits, made to wait for preempted requests too.

A request that lost its blocks to others goes back among those that wait, with the tokens that it has. Under a pause
that waits (0.32) vLLM takes none of these up again, and calls itself drained all the same: after an update such a
request would go on with other weights, an answer of two versions. Here they are among those that a pause still admits.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

__all__ = ["drain_preempted"]

_NAMES = ("set_pause_state", "_preempt_request", "_holds_kv_blocks")


def drain_preempted() -> None:
    """Changes vLLM's scheduler for this process; nothing in a vLLM that pauses otherwise. Idempotent."""
    try:
        kind: Any = importlib.import_module("vllm.v1.core.sched.scheduler").Scheduler
        paused = importlib.import_module("vllm.v1.core.sched.interface").PauseState.PAUSED_NEW
        preempted = importlib.import_module("vllm.v1.request").RequestStatus.PREEMPTED
    except (ImportError, AttributeError):
        return
    if not all(name in vars(kind) for name in _NAMES) or hasattr(kind.set_pause_state, "drains_preempted"):
        return
    set_pause_state, preempt, holds_blocks = kind.set_pause_state, kind._preempt_request, kind._holds_kv_blocks

    def admit(scheduler: Any) -> None:
        """Those that a pause admits are the ones in `kv_holding_waiting`."""
        if found := [request for request in scheduler.waiting if request.status == preempted]:
            scheduler.waiting.remove_requests(found)
            for request in found:
                scheduler.kv_holding_waiting.add_request(request)

    @functools.wraps(set_pause_state)
    def pausing(self: Any, pause_state: Any) -> None:
        set_pause_state(self, pause_state)
        if pause_state == paused:
            admit(self)

    @functools.wraps(preempt)
    def preempting(self: Any, *args: Any, **kwargs: Any) -> None:
        preempt(self, *args, **kwargs)
        if self.pause_state == paused:
            admit(self)

    def holds(self: Any, request: Any) -> bool:
        """Where one that cannot be taken up in this step is put back to."""
        return bool(holds_blocks(request)) or (self.pause_state == paused and request.status == preempted)

    pausing.drains_preempted = True  # type: ignore[attr-defined]
    kind.set_pause_state, kind._preempt_request, kind._holds_kv_blocks = pausing, preempting, holds

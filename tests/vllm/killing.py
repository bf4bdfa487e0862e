"""Kills a process at a step of the next update; run in an engine's process, or as a method of one of its ranks."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

from mxcore.engine import Staged
from mxcore.engine.rungs import PeerRung
from mxcore.transfer.member import Membership

STEPS: dict[str, tuple[Any, str]] = {
    "a holder is found": (PeerRung, "_fitting"),
    "its weights fit": (Membership, "receive"),
    "the first module is written": (Staged, "commit"),
    "the new version is offered": (Membership, "serve"),
}


def kill_at(step: str, pid: int = 0, number: int = 1) -> None:
    """SIGKILL to a process, this one by default, before the step's nth time; it is gone when that begins.

    Where the step is never so often, nobody is killed.
    """
    left = number
    owner, name = STEPS[step]
    function = vars(owner)[name]

    def killing(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal left
        left -= 1
        if left:
            return function(self, *args, **kwargs)
        setattr(owner, name, function)
        os.kill(pid or os.getpid(), signal.SIGKILL)
        while _runs(pid):
            pass
        return function(self, *args, **kwargs)

    setattr(owner, name, killing)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


class KillingExtension:
    """Methods for `worker_extension_cls`."""

    def kill_rank(self, rank: int, step: str, number: int) -> None:
        """As `kill_at`, of that rank."""
        from vllm.distributed import get_tp_group

        if get_tp_group().rank_in_group == rank:
            kill_at(step, number=number)

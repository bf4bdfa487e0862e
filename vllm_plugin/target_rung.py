"""The one rung of `mx-target`: raw weights of a source that is waited for; and which rungs each role has."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from torch import nn

from mxcore.errors import LayoutMismatch
from mxcore.load_ladder import PollResult, Rung, skip, take
from vllm_plugin import compat
from vllm_plugin.roles import TARGET_WAIT_SECONDS, Wait, ranks_wanted, wait_for_ranks
from vllm_plugin.rungs import PeerRung, made_rungs

if TYPE_CHECKING:
    from vllm_plugin.loading import Load

__all__ = ["TargetRung", "rungs_of"]

_log = logging.getLogger(__name__)

_MOST_PAUSES = 8  # of Wait: a source that refuses is not asked every second for two hours


class TargetRung(PeerRung):
    """Waits for a source, MX_SOURCE_WAIT_SECS or two hours; after a transfer that failed, for the same or another."""

    tries = 1_000_000  # the time is what bounds it

    def __init__(self, load: Load) -> None:
        super().__init__(load)
        chosen = "source_wait_seconds" in load.settings.model_fields_set
        self._limit_seconds = load.settings.source_wait_seconds if chosen else TARGET_WAIT_SECONDS
        self._wait: Wait | None = None
        self._is_together = not load.settings.sync_start
        self._last_failure = ""
        self._failures = 0

    def poll(self) -> PollResult:
        """Taken when a source is READY; skipped, for good, when the time is over."""
        load = self._load
        if load.membership is None:
            return skip(load.alone)
        if load.cannot_receive:
            return skip(load.cannot_receive)
        wait = self._wait = self._wait or Wait(f"a source of {load.what()}", self._limit_seconds)
        self._sources = self._found()
        while not self._sources:
            if not wait.pause():
                return skip(self._too_late("no source is there"))
            self._sources = self._found()
        if not self._is_together and not self._begin_together(wait):
            return skip(self._too_late(f"not all {ranks_wanted(load)} ranks have a source (MX_SYNC_START)"))
        return take(f"{len(self._sources)} sources, the first is worker {self._sources[0].worker_id}")

    def _begin_together(self, wait: Wait) -> bool:
        """MX_SYNC_START: every rank has a source, and every worker of this engine knows it."""
        load = self._load
        if load.membership is None or not wait_for_ranks(load.membership, wait, ranks_wanted(load), ready=True):
            return False
        if trouble := compat.world_barrier(wait.left_seconds):
            _log.warning("this engine's workers do not begin together: %s", trouble)
        self._is_together = True
        return True

    def _too_late(self, what: str) -> str:
        last = f"; the last transfer failed: {self._last_failure}" if self._last_failure else ""
        return f"{what} within {self._limit_seconds:g} s (MX_SOURCE_WAIT_SECS){last}"

    def load(self) -> nn.Module:
        """As PeerRung."""
        try:
            return super().load()
        except Exception as error:
            self._last_failure = str(error) or type(error).__name__
            self._failures += 1
            if not isinstance(error, LayoutMismatch):  # what failed may come right: the same worker may do next time
                self._load.avoid.clear()
            raise

    def undo(self) -> None:
        """As PeerRung, and a moment passes, a longer one after each failure."""
        super().undo()
        if self._wait is not None:
            for _ in range(min(2**self._failures // 2, _MOST_PAUSES)):
                self._wait.pause()


def rungs_of(load: Load) -> list[Rung[nn.Module]]:
    """The rungs of MX_LOAD_PATHS that the role of this load allows; for a target, the one that waits."""
    if not load.role.reads_storage:
        return [TargetRung(load)]
    rungs = made_rungs(load, load.settings.load_paths)
    return rungs if load.role.pulls else [rung for rung in rungs if not isinstance(rung, PeerRung)]

"""The one rung of a worker that only pulls: raw weights of a source that is waited for."""

from __future__ import annotations

import logging

from mxcore.engine.context import LoadContext
from mxcore.engine.loaded import Loaded
from mxcore.engine.rungs.peer import PeerRung, Tried
from mxcore.engine.rungs.waiting import Wait, wait_for_ranks
from mxcore.errors import LayoutMismatch
from mxcore.load_ladder import PollResult, skip, take

__all__ = ["TargetRung"]

TARGET_WAIT_SECONDS = 7200.0
_MOST_PAUSES = 8  # of Wait: a source that refuses is not asked every second for two hours

_log = logging.getLogger(__name__)


class TargetRung(PeerRung):
    """Waits for a source, MX_SOURCE_WAIT_SECS or two hours; after a transfer that failed, for the same or another."""

    def __init__(self, context: LoadContext, tried: Tried) -> None:
        super().__init__(context, tried)
        chosen = "source_wait_seconds" in context.settings.model_fields_set
        self._limit_seconds = context.settings.source_wait_seconds if chosen else TARGET_WAIT_SECONDS
        self._wait: Wait | None = None
        self._is_together = not context.settings.sync_start
        self._last_failure = ""
        self._failures = 0

    def poll(self) -> PollResult:
        """Taken when a source is READY; skipped, for good, when the time is over."""
        if reason := self._hopeless():
            return skip(reason)
        context = self._context
        wait = self._wait = self._wait or Wait(f"a source of {context.what}", self._limit_seconds)
        if self._failures and wait.left_seconds <= 0:
            return skip(self._too_late("no source gave the weights"))
        self._sources = self._found()
        while not self._sources:
            if context.agreement.is_given_up():
                return skip("another process of this engine goes on without a source")
            if not wait.pause():
                return skip(self._too_late("no source is there"))
            self._sources = self._found()
        if not self._is_together and not self._begin_together(wait):
            return skip(self._too_late(f"not all {context.ranks_wanted} ranks have a source (MX_SYNC_START)"))
        return take(f"{len(self._sources)} sources, the first is worker {self._sources[0].worker_id}")

    def _begin_together(self, wait: Wait) -> bool:
        """MX_SYNC_START: every rank has a source, and every worker of this engine knows it."""
        context = self._context
        if context.membership is None or not wait_for_ranks(context.membership, wait, context.ranks_wanted, ready=True):
            return False
        if trouble := context.engine.barrier(wait.left_seconds):
            _log.warning("this engine's workers do not begin together: %s", trouble)
        self._is_together = True
        return True

    def _too_late(self, what: str) -> str:
        last = f"; the last transfer failed: {self._last_failure}" if self._last_failure else ""
        return f"{what} within {self._limit_seconds:g} s (MX_SOURCE_WAIT_SECS){last}"

    def load(self) -> Loaded:
        """As PeerRung."""
        try:
            return super().load()
        except Exception as error:
            self._last_failure = str(error) or type(error).__name__
            self._failures += 1
            if not isinstance(error, LayoutMismatch):  # what failed may come right: the same worker may do next time
                self._tried.failed.clear()
            raise

    def undo(self) -> None:
        """As PeerRung, and a moment passes, a longer one after each failure."""
        super().undo()
        if self._wait is not None:
            for _ in range(min(2**self._failures // 2, _MOST_PAUSES)):
                self._wait.pause()

    def again(self) -> bool:
        """Always: the time is what bounds it, in `look`."""
        return True

"""Bounded waits for other workers."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from mxcore.transfer.member import Membership
from mxserver.wire import WireError

__all__ = ["Wait", "wait_for_ranks"]

TOLD_EVERY_SECONDS = 30.0
POLL_SECONDS = 1.0

_log = logging.getLogger(__name__)


class Wait:
    """A bounded wait that says every half minute what it waits for. `now` and `sleep` are for tests."""

    def __init__(
        self,
        what: str,
        limit_seconds: float,
        *,
        now: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.what = what
        self.limit_seconds = limit_seconds
        self._now = now
        self._sleep = sleep
        self._began = self._told = now()
        _log.info("waiting for %s, at most %g s", what, limit_seconds)

    @property
    def left_seconds(self) -> float:
        """What is left of the time; not above 0 when it is over."""
        return self._began + self.limit_seconds - self._now()

    def pause(self) -> bool:
        """Lets a moment pass; False when the time is over."""
        left = self.left_seconds
        if left <= 0:
            return False
        self._sleep(min(POLL_SECONDS, left))
        now = self._now()
        if now - self._told >= TOLD_EVERY_SECONDS:
            self._told = now
            _log.info("still waiting for %s: %.0f of %g s", self.what, now - self._began, self.limit_seconds)
        return True


def wait_for_ranks(membership: Membership, wait: Wait, wanted: int, *, ready: bool) -> bool:
    """Until that many ranks of these weights are published, or READY; False when the time is over."""
    while True:
        try:
            if len(membership.published_ranks(ready=ready)) >= wanted:
                return True
        except WireError as error:
            _log.debug("ranks cannot be listed: %s", error)
        if not wait.pause():
            return False

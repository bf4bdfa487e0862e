"""The sessions of one receiver, few at a time: each of them registers all of its memory once more."""

from __future__ import annotations

import logging
import threading

from mxcore.errors import NixlError, SourceBusy
from mxcore.transfer.move.agent_session import AgentSession
from mxcore.transfer.move.session_ahead import SessionAhead

__all__ = ["MOST_REGISTRATIONS", "RegisteredSessions"]

logger = logging.getLogger(__name__)

MOST_REGISTRATIONS = 2
"""Of a receiver's memory, at the same time: for two holders. What it serves meanwhile is registered once besides."""


class RegisteredSessions:
    """A session for a holder, of `ahead`, at most `most` at a time. Thread-safe; end it with `drop`.

    Each holder has an agent of its own, which can be fenced without the others. Pinned memory counts once for each, and
    of a device's memory only so much can be reached from outside (BAR1): where it cannot be registered once more, those
    that there are have to do.
    """

    def __init__(self, ahead: SessionAhead, most: int = MOST_REGISTRATIONS) -> None:
        self._ahead = ahead
        self._most = most
        self._lock = threading.Lock()
        self._taken = 0
        self._turned_away: set[str] = set()

    def start(self) -> None:
        """Makes the first session ahead."""
        self._ahead.start()

    def take(self, tls: str, holder: str) -> AgentSession:
        """A session with this UCX_TLS for a holder; end it with `fence`.

        Raises SourceBusy while there are as many as may be, else what `SessionAhead.take` raises.
        """
        with self._lock:
            if self._taken >= self._most:
                self._turned_away.add(holder)
                raise SourceBusy(f"the memory is registered {self._taken} times, for other holders than {holder}")
            self._taken += 1
        try:
            return self._ahead.take(tls)
        except BaseException as error:
            with self._lock:
                self._taken -= 1
                if not self._taken or not isinstance(error, NixlError):
                    raise
                self._most = self._taken
                self._turned_away.add(holder)
            logger.warning("the memory cannot be registered once more, %d holders give: %s", self._most, error)
            raise SourceBusy(f"the memory cannot be registered for {holder} as well: {error}") from error

    @property
    def wanted(self) -> bool:
        """Whether a holder was turned away, and none has ended since."""
        with self._lock:
            return self._taken >= self._most and bool(self._turned_away)

    def may_take(self, holder: str) -> bool:
        """False for a holder that was turned away, while nothing has changed."""
        with self._lock:
            if holder in self._turned_away and self._taken >= self._most:
                return False
            self._turned_away.discard(holder)
            return True

    def fence(self, session: AgentSession) -> None:
        """Ends a session that was taken. Raises FenceFailed."""
        try:
            session.fence()
        finally:
            with self._lock:
                self._taken -= 1

    def drop(self) -> None:
        """Ends what was made ahead and not taken. Raises FenceFailed."""
        self._ahead.drop()

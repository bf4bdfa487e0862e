"""An agent that is made before it is needed: UCX takes half a second to start the first agent of a process."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from mxcore.errors import FenceFailed
from mxcore.settings import WorkerSettings
from mxcore.transfer.move.agent_session import FENCE_SECONDS, AgentSession
from mxserver.wire import MxError

__all__ = ["SessionAhead"]

logger = logging.getLogger(__name__)


class SessionAhead:
    """Makes sessions of one worker; after `start`, one of UCX_TLS `tls` on a thread of its own. Thread-safe.

    Without a `tls` none is made ahead. `prepare` is called with each session, best with what registers memory.
    `progress_thread`: see AgentSession. End it with `drop`.
    """

    def __init__(
        self,
        settings: WorkerSettings,
        worker_id: str,
        tls: str | None,
        progress_thread: bool,
        prepare: Callable[[AgentSession], object] = lambda session: None,
    ) -> None:
        self._settings = settings
        self._worker_id = worker_id
        self._tls = tls
        self._prepare = prepare
        self._progress_thread = progress_thread
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._session: AgentSession | None = None

    def start(self) -> None:
        """Begins; idempotent. A failure is only logged: `take` runs into it again, and raises."""
        with self._lock:
            if self._thread is None and self._tls is not None:
                # No daemon: a process that ends while UCX starts would unload it under this thread.
                self._thread = threading.Thread(target=self._run, args=(self._tls,), name="mx-agent-ahead")
                self._thread.start()

    def take(self, tls: str, progress_thread: bool = False) -> AgentSession:
        """The session that was made ahead, if it is of this kind and not taken yet, else a new one.

        The caller fences it. Raises NixlMissing, NixlError, FenceFailed, and what `prepare` raises.
        """
        fits = (tls, progress_thread) == (self._tls, self._progress_thread)
        if fits and (session := self._made()) is not None:
            return session
        return self._make(tls, progress_thread)

    def drop(self) -> None:
        """Fences the session that was not taken. Idempotent. Raises FenceFailed."""
        if (session := self._made()) is not None:
            session.fence()

    def _made(self) -> AgentSession | None:
        if self._thread is not None:
            self._thread.join(FENCE_SECONDS)
            if self._thread.is_alive():
                raise FenceFailed(f"an agent of worker {self._worker_id} was not made within {FENCE_SECONDS:g} s")
        with self._lock:
            session, self._session = self._session, None
        return session

    def _run(self, tls: str) -> None:
        try:
            session = self._make(tls, self._progress_thread)
        except MxError as error:
            logger.debug("no agent was made ahead: %s", error)
            return
        with self._lock:
            self._session = session

    def _make(self, tls: str, progress_thread: bool) -> AgentSession:
        session = AgentSession(
            self._worker_id,
            tls=tls,
            backend=self._settings.nixl_backend,
            stall_timeout_seconds=self._settings.stall_timeout_seconds,
            progress_thread=progress_thread,
        )
        try:
            self._prepare(session)
        except BaseException:
            session.fence()
            raise
        return session

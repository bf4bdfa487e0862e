"""A holder's NIXL agent, which exists only where a reader needs one."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from mxcore.errors import NixlError
from mxcore.transfer.layout import Layout, Placement
from mxcore.transfer.move import AgentSession
from mxcore.transfer.route import UcxPolicy

__all__ = ["HolderAgent"]

logger = logging.getLogger(__name__)


class HolderAgent:
    """Makes the agent, with the holder's memory registered, when it is first asked for. Thread-safe.

    Until then nothing reaches the memory by NIXL, and NIXL need not be installed. End it with `close`.
    """

    def __init__(self, make: Callable[[], AgentSession], layout: Layout, placement: Placement) -> None:
        self._make = make
        self._layout = layout
        self._placement = placement
        self._lock = threading.Lock()
        self._session: AgentSession | None = None
        self._failure: NixlError | None = None
        self._closed = False

    @property
    def name(self) -> str:
        """The agent's name; empty while there is none."""
        session = self._session
        return session.name if session is not None else ""

    @property
    def failed(self) -> bool:
        """Whether one was asked for, and could not be made."""
        return self._failure is not None

    @property
    def notifies(self) -> bool:
        """Whether there is one that can notify peers of each move."""
        session = self._session
        return session is not None and session.notifies

    def make_early(self, policy: UcxPolicy) -> None:
        """Makes the agent now where readers need it: registering may take longer than they wait.

        Raises NixlMissing, NixlError where nobody could take anything without it.
        """
        device_type = self._placement.device_type
        if not policy.needs_agent(device_type):
            return
        try:
            self.session()
        except NixlError as error:
            if device_type != "cpu" or not (policy.sends or policy.attaches):
                raise
            logger.warning("these weights are served over TCP or within this host alone, as NIXL fails: %s", error)

    def session(self) -> AgentSession:
        """The agent, made by the first call. Raises NixlMissing, NixlError: at once where that failed before."""
        with self._lock:
            if self._failure is not None:
                raise type(self._failure)(*self._failure.args)
            if self._closed:
                raise NixlError("this worker has stopped serving: it makes no NIXL agent any more")
            if self._session is None:
                try:
                    self._session = self._registered()
                except NixlError as error:
                    self._failure = type(error)(*error.args)  # without the traceback, which holds frames
                    raise
            return self._session

    def _registered(self) -> AgentSession:
        session = self._make()
        try:
            session.register(self._layout, self._placement)
        except BaseException:
            session.fence()
            raise
        return session

    def close(self) -> None:
        """Fences the agent if there is one, and makes none any more. Idempotent."""
        with self._lock:
            self._closed = True
            session = self._session
        if session is not None:
            session.fence()

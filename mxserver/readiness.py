"""Probes do what clients do: a heartbeat's way through gRPC and its threads, and a change's way through the store.

Looked at once a second, in a thread of its own, so that a probe is answered at once whatever hangs, and however many
ask. A slow disk is not a reason: publishes wait for it, and the metrics of the store show how long.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import grpc

from mxserver.store import SourceStore, StoreEnded, StoreUnavailable

_LOG = logging.getLogger(__name__)

ANSWER_SECONDS = 5.0  # for a call of ours; those of others take part of a second
MOST_FAILURES = 6  # calls in a row: then a restart is the only way
MOST_AGE_SECONDS = 30.0  # of the last look

HEARTBEAT = "/model_express.mx.Probe/Heartbeat"
CALL = "/model_express.mx.Probe/Call"


class Readiness:
    """What the last look has found. Thread-safe; `look` is called by one thread."""

    def __init__(self, store: SourceStore) -> None:
        self._store = store
        self._channel: grpc.Channel | None = None
        self._heard: Callable[[], None] = lambda: None
        self._store_problem: str | None = None
        self._path_problem: str | None = None
        self._failed_calls = 0
        self._looked_at = time.monotonic()
        self.must_end = threading.Event()
        """Set when the server cannot work again without a restart."""

    def connect(self, address: str, heard: Callable[[], None]) -> None:
        """Our own server listens there. `heard` is called for each heartbeat that came through."""
        self._heard = heard
        self._channel = grpc.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)])

    @property
    def store_problem(self) -> str | None:
        """Why the store does not work; None if it does."""
        return self._store_problem

    @property
    def hears(self) -> bool:
        """Whether heartbeats come through."""
        return self._path_problem is None

    def not_ready(self) -> str | None:
        """Why clients should go elsewhere; None where they need not."""
        age = time.monotonic() - self._looked_at
        if age > MOST_AGE_SECONDS:
            return f"nothing could be looked at for {age:.0f} s"
        return self._store_problem or self._path_problem

    def not_alive(self) -> str | None:
        """Why only a restart helps; None where that is not so."""
        if self.must_end.is_set():
            return self._store_problem or "the server cannot go on"
        return "no call is answered any more" if self._failed_calls >= MOST_FAILURES else None

    def look(self) -> None:
        """Takes a few seconds where something hangs. Never raises for what it finds."""
        self._look_at_calls()
        self._look_at_store()
        self._looked_at = time.monotonic()

    def close(self) -> None:
        if self._channel is not None:
            self._channel.close()

    def _look_at_calls(self) -> None:
        if self._channel is None:
            return
        channel: Any = self._channel  # its stubs know only serializers
        calls: dict[str, Any] = {
            method: channel.unary_unary(method).future(b"", timeout=ANSWER_SECONDS, wait_for_ready=True)
            for method in (HEARTBEAT, CALL)
        }
        answered = {method: call.code() is grpc.StatusCode.OK for method, call in calls.items()}
        self._failed_calls = 0 if answered[CALL] else self._failed_calls + 1
        if answered[HEARTBEAT]:
            self._heard()
        problem = None if answered[HEARTBEAT] else f"a heartbeat is not answered within {ANSWER_SECONDS:g} s"
        self._tell(self._path_problem, problem, "heartbeats")
        self._path_problem = problem

    def _look_at_store(self) -> None:
        problem = None
        try:
            self._store.check()
        except StoreUnavailable as error:
            problem = f"the store does not work: {error}"
            if isinstance(error, StoreEnded):
                self.must_end.set()
        self._tell(self._store_problem, problem, "the store")
        self._store_problem = problem

    def _tell(self, before: str | None, now: str | None, what: str) -> None:
        if now and not before:
            _LOG.error("%s", now)
        elif before and not now:
            _LOG.info("%s works again", what)

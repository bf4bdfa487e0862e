"""Who has weights, as the server tells it on a stream; from a server that has none, by questions, fewer in a fleet."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable

from mxcore.transfer.member.directory import Directory
from mxcore.transfer.move import Source
from mxserver.wire import MethodMissing, WireError
from mxserver.wire.calls import Closing, OpenWatch, ServerClient
from mxserver.wire.proto import p2p_pb2, watch_pb2

__all__ = ["LAG_SECONDS", "WatchedSources"]

logger = logging.getLogger(__name__)

LAG_SECONDS = 2.5
"""What was told may be so old: of another replica the server hears within a second, and it tells many one by one."""

_FIRST_SECONDS = 5.0  # for the first message; then the server is asked instead
_FIRST_SECONDS_RECEIVING = 15.0  # who receives has sources: where thousands begin, asking makes it later
_FIRST_AGAIN_SECONDS, _LONGEST_AGAIN_SECONDS = 0.25, 15.0  # before a broken stream is opened again
_ASK_SECONDS = 1.0  # between two questions, at least
_ASK_SECONDS_A_HOLDER = 0.1
_LONGEST_ASK_SECONDS = 5.0
_TURN_SECONDS = 10.0  # a worker that nobody tells to ask for the turn, and of no reader, asks by itself


class WatchedSources(Closing):
    """Sources of one identity, while it is open. Thread-safe; a thread reads the stream.

    A stream that breaks is opened again after a time that grows and differs for each worker: who lost a server together
    does not come back together.
    """

    def __init__(
        self,
        client: ServerClient,
        directory: Directory,
        identity: p2p_pb2.SourceIdentity,
        *,
        wants_turn: bool = False,
        when_told: Callable[[], None] = lambda: None,
    ) -> None:
        """`wants_turn`: this worker would read storage for others. `when_told` is called, on the thread that reads the
        stream, when there is something else to know.
        """
        self._client, self._directory, self._identity = client, directory, identity
        self._wants_turn, self._when_told = wants_turn, when_told
        self._changed = threading.Condition()
        self._now: watch_pb2.SourcesNow | None = None  # None while there is no stream
        self._messages = self._seen = 0
        first_seconds = _FIRST_SECONDS if wants_turn else _FIRST_SECONDS_RECEIVING
        self._opening_until = time.monotonic() + first_seconds  # until then an answer is worth waiting for
        self._call: OpenWatch | None = None
        self._closed = threading.Event()
        self._ask_at = 0.0  # monotonic, when the server may be asked again
        self._ask_seconds = _ASK_SECONDS
        self._turn_at = time.monotonic() + _TURN_SECONDS * random.uniform(1, 2)  # noqa: S311 - no secret
        self._told_doubts: set[str] = set()
        self._thread = threading.Thread(target=self._run, name="mx-watch", daemon=True)
        self._thread.start()

    @property
    def is_told(self) -> bool:
        """Whether the stream is open, and has said something."""
        return self._now is not None

    @property
    def reader(self) -> str:
        """The worker that reads storage for all; empty: nobody, or it is not known."""
        now = self._now
        return now.reader_worker_id if now is not None else ""

    def holders(self) -> list[Source] | None:
        """Complete ones, then those that are receiving; None where nothing more is known than before.

        Without a stream the server is asked, the less often the more there are. Raises WireError.
        """
        now = self._now
        if now is not None:
            return self._directory.told(now)
        moment = time.monotonic()
        if moment < max(self._opening_until, self._ask_at):
            return None
        found = self._directory.holders(self._identity)
        least = max(_ASK_SECONDS, _ASK_SECONDS_A_HOLDER * len(found))
        self._ask_seconds = min(_LONGEST_ASK_SECONDS, max(least, 1.5 * self._ask_seconds))
        self._ask_at = moment + self._ask_seconds * random.uniform(0.5, 1.5)  # noqa: S311 - no secret
        return found

    def may_ask_for_turn(self) -> bool:
        """Whether to ask for the turn to read storage now: the server says so, or has said nothing for long."""
        now = self._now
        if now is None or now.ask_turn:
            return True
        if now.reader_worker_id or time.monotonic() < self._turn_at:
            return False
        self._turn_at = time.monotonic() + _TURN_SECONDS * random.uniform(1, 2)  # noqa: S311 - no secret
        return True

    def wait_for_first(self, stopped: Callable[[], bool]) -> None:
        """Until the stream has said something or cannot, for a few seconds at most."""
        while time.monotonic() < self._opening_until and not stopped():
            self.wait(0.25)
            if self.is_told:
                return

    def wait(self, seconds: float) -> None:
        """Until something else is told than at the last wait, at most so long."""
        with self._changed:
            self._changed.wait_for(lambda: self._messages != self._seen or self._closed.is_set(), seconds)
            self._seen = self._messages

    def close(self) -> None:
        """Idempotent."""
        self._closed.set()
        with self._changed:
            call = self._call
            self._changed.notify_all()
        if call is not None:
            call.cancel()
        self._thread.join()

    def _run(self) -> None:
        pause = _FIRST_AGAIN_SECONDS
        while not self._closed.is_set():
            try:
                self._read()
                pause = _FIRST_AGAIN_SECONDS
            except MethodMissing as error:
                logger.debug("the server is asked from time to time instead: %s", error)
                return
            except WireError as error:
                logger.debug("the stream of sources broke, it is opened again: %s", error)
            finally:
                heard = self._now is not None
                with self._changed:
                    self._now, self._call, self._opening_until = None, None, 0.0
                    self._messages += 1
                    self._changed.notify_all()
            if heard:
                pause = _FIRST_AGAIN_SECONDS
            self._closed.wait(pause * random.uniform(0.5, 1.5))  # noqa: S311 - no secret
            pause = min(2 * pause, _LONGEST_AGAIN_SECONDS)

    def _read(self) -> None:
        call = self._client.watch_sources(self._directory.watch_request(self._identity, wants_turn=self._wants_turn))
        with self._changed:
            self._call = call
        if self._closed.is_set():
            call.cancel()
        for now in call:
            self._tell_doubts(now)
            with self._changed:
                self._now = now
                self._messages += 1
                self._changed.notify_all()
            self._when_told()

    def _tell_doubts(self, now: watch_pb2.SourcesNow) -> None:
        for doubt in now.doubts:
            if doubt.text not in self._told_doubts and doubt.worker_id:
                self._told_doubts.add(doubt.text)
                logger.warning("worker %s doubts %s: %s", doubt.worker_id, ", ".join(doubt.holders), doubt.text)

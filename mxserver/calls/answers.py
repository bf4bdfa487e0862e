"""Answers under way: what clients ask for and do not take stays in this process' memory, so its bytes are limited.

Where there is no room for an answer, the oldest ones of the connection with the most bytes end, once they had time
for a slow client; until then the new one waits. Answers of a few KiB are not counted: calls are limited.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import grpc

from mxserver.calls.handlers import Handler, HandlerInterceptor, behaviour_of, made_handler
from mxserver.calls.refusals import refuse
from mxserver.limits import DEFAULT, ServerLimits

_LOG = logging.getLogger(__name__)

COUNTED_FROM_BYTES = 4096
LARGE_BYTES = 1024 * 1024
KEPT_FOR_SMALL_BYTES = 16 * 1024 * 1024  # of the room: large answers keep listings from none of it
PATIENCE_SECONDS = 20.0  # for room; below the 30 s that clients wait
QUICK_SECONDS = 1.0
SLOW_CLIENTS_BYTES_PER_SECOND = 8 * 1024 * 1024


@dataclass
class _Answer:
    connection: str
    bytes: int
    since: float  # monotonic seconds
    ends: bool = False
    is_made: bool = False  # until then what it takes is in memory whether or not the call goes on
    is_over: bool = False

    def may_end_at(self) -> float:
        """When a slow client would have taken it."""
        return self.since + QUICK_SECONDS + self.bytes / SLOW_CLIENTS_BYTES_PER_SECOND


class AnswersUnderWay(HandlerInterceptor):
    """Counts the single answers of calls until their clients have taken them. Thread-safe."""

    def __init__(self, limits: ServerLimits = DEFAULT) -> None:
        super().__init__()
        self._limits = limits
        self._changed = threading.Condition()
        self._under_way: dict[grpc.ServicerContext, _Answer] = {}  # the oldest first
        self._bytes = 0

    @property
    def bytes_under_way(self) -> int:
        """Of all answers that are counted."""
        return self._bytes

    def reserve(self, context: grpc.ServicerContext, size_bytes: int, *, is_made: bool = False) -> None:
        """Waits for room for this call's answer; before it is made, where that takes memory too. Ends with the call,
        and not before the answer is made.

        Refuses the call where none comes.
        """
        if size_bytes < COUNTED_FROM_BYTES:
            return
        refused = False
        with self._changed:
            if (known := self._under_way.get(context)) is not None:
                self._bytes += size_bytes - known.bytes
                known.bytes = size_bytes
                return
            latest = time.monotonic() + PATIENCE_SECONDS
            while not self._has_room(size_bytes) and context.is_active() and not refused:
                wait = min(self._make_room(size_bytes), latest) - time.monotonic()
                self._changed.wait(max(0.01, wait))
                refused = time.monotonic() >= latest
            if not refused:
                self._under_way[context] = _Answer(context.peer(), size_bytes, time.monotonic(), is_made=is_made)
                self._bytes += size_bytes
        if refused:
            found = f"this answer has {size_bytes} bytes, and {self._bytes} are under way to others"
            refuse(context, grpc.StatusCode.RESOURCE_EXHAUSTED, self._limits.refusal("answer_bytes", found))
        if not context.add_callback(lambda: self._ended(context)):
            self._ended(context)
            self._made(context)  # it will not be
            refuse(context, grpc.StatusCode.CANCELLED, "nobody waits for this answer any more")

    def _has_room(self, size_bytes: int) -> bool:
        """Called with the lock. One that is larger than all room may go alone."""
        most = self._limits.answer_bytes - (KEPT_FOR_SMALL_BYTES if size_bytes > LARGE_BYTES else 0)
        return not self._under_way or self._bytes + size_bytes <= most

    def _make_room(self, size_bytes: int) -> float:
        """Ends the oldest answers of who has the most, and says when to look again. Called with the lock."""
        now = time.monotonic()
        of: Counter[str] = Counter()
        for answer in self._under_way.values():
            of[answer.connection] += answer.bytes
        by_share = sorted(self._under_way.items(), key=lambda one: (-of[one[1].connection], one[1].since))
        coming = sum(answer.bytes for answer in self._under_way.values() if answer.ends)
        for context, answer in by_share:
            if coming >= size_bytes:
                break
            if not answer.ends and answer.may_end_at() <= now:
                answer.ends = True
                coming += answer.bytes
                _LOG.info("answer ended peer=%s bytes=%d: it was not taken in time", answer.connection, answer.bytes)
                context.cancel()
        return min((one.may_end_at() for one in self._under_way.values() if not one.ends), default=now + 1.0)

    def _ended(self, context: grpc.ServicerContext) -> None:
        with self._changed:
            if (answer := self._under_way.get(context)) is not None:
                answer.is_over = True
                self._drop_if_gone(context, answer)

    def _made(self, context: grpc.ServicerContext) -> None:
        with self._changed:
            if (answer := self._under_way.get(context)) is not None:
                answer.is_made = True
                self._drop_if_gone(context, answer)

    def _drop_if_gone(self, context: grpc.ServicerContext, answer: _Answer) -> None:
        """Called with the lock."""
        if answer.is_over and answer.is_made:
            del self._under_way[context]
            self._bytes -= answer.bytes
            self._changed.notify_all()

    def _wraps(self, method: str, handler: Handler) -> bool:
        return not handler.response_streaming

    def _replacement(self, method: str, handler: Handler) -> Handler:
        behaviour, serialize = behaviour_of(handler), handler.response_serializer

        @functools.wraps(behaviour)  # keeps a method's own thread pool
        def answer(request: Any, context: grpc.ServicerContext) -> bytes:
            try:
                made: bytes = _serialized(behaviour(request, context), serialize)
                self.reserve(context, len(made), is_made=True)
            finally:
                self._made(context)
            return made

        return made_handler(
            handler, answer, request_deserializer=handler.request_deserializer, response_serializer=None
        )


def _serialized(answer: Any, serialize: Callable[[Any], bytes] | None) -> Any:
    return answer if serialize is None else serialize(answer)

"""The way to refuse a call: errors become gRPC statuses, with the error's code in the trailing metadata."""

from __future__ import annotations

import functools
import inspect
import logging
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn, TypeVar

import grpc

from mxserver.wire import MxError
from mxserver.wire.calls import ERROR_CODE_METADATA

Method = TypeVar("Method", bound=Callable[..., Any])

Statuses = Mapping[type[MxError], grpc.StatusCode]
"""The status for each kind of error; the first kind that fits counts, so subclasses come before their bases."""

_LOG = logging.getLogger(__name__)

LINES = 20
LINE_SECONDS = 10.0
"""So many lines of refusals a method and kind of error in such a time; the next one says how many were left out."""

# The server's own trouble and forbidden calls are for the people who run it; the rest is for the caller alone.
_WARNED_OF = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.PERMISSION_DENIED)


def refuse(context: grpc.ServicerContext, status: grpc.StatusCode, reason: MxError | str) -> NoReturn:
    """Ends a call with this status and the reason as its details. An error's code goes into the trailing metadata."""
    if isinstance(reason, MxError):
        context.set_trailing_metadata(((ERROR_CODE_METADATA, reason.code),))
    context.abort(status, str(reason))
    raise AssertionError("abort returned")


def refuse_for(method: str, context: grpc.ServicerContext, error: MxError, statuses: Statuses) -> NoReturn:
    """Logs an error and ends the call with its status in the table, which must have one."""
    status = next(status for kind, status in statuses.items() if isinstance(error, kind))
    level = logging.WARNING if status in _WARNED_OF else logging.INFO
    left_out = _LINES.take((method, type(error)))
    if left_out is not None:
        more = f" ({left_out} such lines were left out)" if left_out else ""
        text = "call refused method=%s peer=%s status=%s reason=%s%s"
        _LOG.log(level, text, method, context.peer(), status.name, error, more)
    refuse(context, status, error)


class LineLimit:
    """How many log lines each reason may have: a stranger could fill the disk with refusals. Thread-safe.

    Reasons must be of a finite set.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._taken: dict[Hashable, tuple[float, int]] = {}  # when the time began (monotonic), lines since

    def take(self, reason: Hashable) -> int | None:
        """None: no line. Otherwise how many were left out since the last one."""
        with self._lock:
            now = time.monotonic()
            began, lines = self._taken.get(reason, (now, 0))
            left_out = 0
            if now - began >= LINE_SECONDS:
                left_out, began, lines = max(0, lines - LINES), now, 0
            self._taken[reason] = (began, lines + 1)
            return left_out if lines < LINES else None


_LINES = LineLimit()


@contextmanager
def refusing(
    method: str,
    context: grpc.ServicerContext,
    statuses: Statuses,
    file_error: Callable[[OSError], MxError] | None = None,
) -> Iterator[None]:
    """Refuses the call for errors of the table that the block raises.

    `file_error` makes such an error of an OSError; without it, OSErrors pass as they are.
    """
    try:
        yield
    except tuple(statuses) as error:
        refuse_for(method, context, error, statuses)
    except OSError as error:
        if file_error is None:
            raise
        refuse_for(method, context, file_error(error), statuses)


def refuses(statuses: Statuses, file_error: Callable[[OSError], MxError] | None = None) -> Callable[[Method], Method]:
    """`refusing` around a whole method of a service, with one answer or a stream of them."""

    def decorate(method: Any) -> Any:
        @functools.wraps(method)
        def answer(self: Any, request: Any, context: grpc.ServicerContext) -> Any:
            with refusing(method.__name__, context, statuses, file_error):
                return method(self, request, context)

        @functools.wraps(method)
        def answers(self: Any, request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
            with refusing(method.__name__, context, statuses, file_error):
                yield from method(self, request, context)

        return answers if inspect.isgeneratorfunction(method) else answer

    return decorate

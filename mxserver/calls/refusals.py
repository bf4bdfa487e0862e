"""The way to refuse a call: errors become gRPC statuses, with the error's code in the trailing metadata."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn, TypeVar

import grpc

from mxserver.wire import MxError
from mxserver.wire.calls import ERROR_CODE_METADATA

Method = TypeVar("Method", bound=Callable[..., Any])

Statuses = Mapping[type[MxError], grpc.StatusCode]
"""The status for each kind of error; the first kind that fits counts, so subclasses come before their bases."""

_LOG = logging.getLogger(__name__)

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
    _LOG.log(level, "call refused method=%s peer=%s status=%s reason=%s", method, context.peer(), status.name, error)
    refuse(context, status, error)


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

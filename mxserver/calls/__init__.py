"""What all gRPC calls share: the wrapper of method handlers, their threads, and the way to refuse a call."""

from __future__ import annotations

from mxserver.calls.handlers import Around, Handler, WrappingInterceptor, with_behaviour
from mxserver.calls.pools import OTHER_THREADS, CallPool, PoolInterceptor, in_pool, threads_of
from mxserver.calls.refusals import Statuses, refuse, refuse_for, refuses, refusing
from mxserver.calls.requests import RequestInterceptor

__all__ = [
    "OTHER_THREADS",
    "Around",
    "CallPool",
    "Handler",
    "PoolInterceptor",
    "RequestInterceptor",
    "Statuses",
    "WrappingInterceptor",
    "in_pool",
    "refuse",
    "refuse_for",
    "refuses",
    "refusing",
    "threads_of",
    "with_behaviour",
]

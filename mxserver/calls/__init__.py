"""What all gRPC calls share: the wrapper of method handlers, their threads, and the way to refuse a call."""

from __future__ import annotations

from mxserver.calls.call_pool import CallPool
from mxserver.calls.handlers import Around, Handler, WrappingInterceptor, with_behaviour
from mxserver.calls.pools import PoolInterceptor, in_pool
from mxserver.calls.refusals import Statuses, refuse, refuse_for, refuses, refusing

__all__ = [
    "Around",
    "CallPool",
    "Handler",
    "PoolInterceptor",
    "Statuses",
    "WrappingInterceptor",
    "in_pool",
    "refuse",
    "refuse_for",
    "refuses",
    "refusing",
    "with_behaviour",
]

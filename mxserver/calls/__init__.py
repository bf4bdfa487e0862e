"""What all gRPC calls share: the wrapper of method handlers, their threads, and the way to refuse a call."""

from __future__ import annotations

from mxserver.calls.answers import AnswersUnderWay
from mxserver.calls.call_pool import CallPool
from mxserver.calls.freed_memory import give_large_parts_back
from mxserver.calls.handlers import Around, Handler, WrappingInterceptor, with_behaviour
from mxserver.calls.nested import length_delimited, split_off, without_large_fields
from mxserver.calls.pools import PoolInterceptor, in_pool
from mxserver.calls.pushed import PushedStream, without_thread
from mxserver.calls.receiving import PATIENCE_SECONDS, Receiving
from mxserver.calls.refusals import Statuses, refuse, refuse_for, refuses, refusing
from mxserver.calls.stalled import StalledStreams

__all__ = [
    "PATIENCE_SECONDS",
    "AnswersUnderWay",
    "Around",
    "CallPool",
    "Handler",
    "PoolInterceptor",
    "PushedStream",
    "Receiving",
    "StalledStreams",
    "Statuses",
    "WrappingInterceptor",
    "give_large_parts_back",
    "in_pool",
    "length_delimited",
    "refuse",
    "refuse_for",
    "refuses",
    "refusing",
    "split_off",
    "with_behaviour",
    "without_large_fields",
    "without_thread",
]

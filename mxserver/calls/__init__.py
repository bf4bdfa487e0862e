"""What all gRPC calls share: the wrapper of method handlers, and the way to refuse a call."""

from __future__ import annotations

from mxserver.calls.handlers import Around, Handler, WrappingInterceptor, with_behaviour
from mxserver.calls.refusals import Statuses, refuse, refuse_for, refuses, refusing

__all__ = [
    "Around",
    "Handler",
    "Statuses",
    "WrappingInterceptor",
    "refuse",
    "refuse_for",
    "refuses",
    "refusing",
    "with_behaviour",
]

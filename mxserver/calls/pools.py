"""Threads for calls, by kind: publishes that wait for a disk keep no heartbeat and no listing from its threads.

In one pool for all they did, until live workers counted as dead (tests/server/services/test_call_pools.py). Requests
are parsed in these threads, after it was decided who calls, and within limits of their kind.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import grpc

from mxserver.calls.arriving import Request
from mxserver.calls.call_pool import CallPool
from mxserver.calls.handlers import Handler, HandlerInterceptor, behaviour_of, made_handler
from mxserver.calls.nested import has_more_messages
from mxserver.calls.pushed import is_without_thread
from mxserver.calls.receiving import PATIENCE_SECONDS, LargeRequests, Receiving
from mxserver.calls.refusals import refuse
from mxserver.limits import DEFAULT, ServerLimits

_P2P = "/model_express.p2p.P2pService/"
_MODELS = "/model_express.model.ModelService/"
_CACHE = "/model_express.mx.CacheService/"

_PUBLISH = f"{_P2P}PublishMetadata"
_UPDATE = f"{_P2P}UpdateStatus"
_PROBE = "/model_express.mx.Probe/"


class Kind(NamedTuple):
    """How calls of one kind are answered."""

    threads: int
    methods: frozenset[str]
    receives: str = "small"


POOLS: dict[str, Kind] = {
    "heartbeats": Kind(16, frozenset({_UPDATE, f"{_PROBE}Heartbeat"}), "heartbeats"),
    "health": Kind(
        4,
        frozenset({"/model_express.health.HealthService/GetHealth", "/grpc.health.v1.Health/Check", f"{_PROBE}Call"}),
    ),
    # One: a listing computes, and each thread that computes makes the one wait that hears of new calls. A thousand
    # listings at once held heartbeats up for 0.8 s with four, 0.3 s with one (SQLite); 1.8 s and 0.4 s with Redis.
    "listings": Kind(1, frozenset({f"{_P2P}ListSources"})),
    "records": Kind(8, frozenset({f"{_P2P}GetMetadata"})),  # wait for room, where they are large
    "publishes": Kind(64, frozenset({_PUBLISH}), "publishes"),  # wait for a disk: as many as one commit can take
    "watches": Kind(4, frozenset({"/model_express.mx.WatchService/WatchSources"})),  # only begin: see pushed.py
    "validations": Kind(8, frozenset({f"{_CACHE}ValidateModel"})),  # each reads a whole model
    "models": Kind(16, frozenset()),  # the cache's other calls, and what models have beside their streams
    "others": Kind(16, frozenset()),  # named nowhere
}
"""Name -> its kind of calls."""


def places() -> dict[str, Receiving]:
    """Where requests are received, by name: publishes may be large, and come one at a time; others wait for a moment,
    and heartbeats for no others.
    """
    return {
        "heartbeats": Receiving(2, PATIENCE_SECONDS),
        "small": Receiving(3, PATIENCE_SECONDS),
        "publishes": Receiving(1, 3.0),
    }


COUNTED_FROM_BYTES = 256 * 1024  # parts of smaller requests cannot take much memory


def pool_of(method: str) -> str:
    """The name of the pool in which a method is answered."""
    named = next((name for name, kind in POOLS.items() if method in kind.methods), None)
    return named or ("models" if method.startswith((_CACHE, _MODELS)) else "others")


class PoolInterceptor(HandlerInterceptor):
    """Has calls answered in the threads of their kind. A method that brings a pool of its own keeps that.

    The last of the interceptors, so that the others' wrappers are around what it makes. Thread-safe. Start
    `large_requests` when the server answers calls; `close` after it has stopped.
    """

    def __init__(self, update_waits: Callable[[bytes], bool], limits: ServerLimits = DEFAULT) -> None:
        """`update_waits`: whether an update of a status will wait for a disk; that is a publish's way then."""
        super().__init__()
        self._limits = limits
        receiving = places()
        self._pools = {
            name: CallPool(kind.threads, f"call-{name}", receiving[kind.receives]) for name, kind in POOLS.items()
        }
        publishes = self._pools["publishes"]
        self._pools["heartbeats"].hands_over(update_waits, publishes)
        others = [receiving["heartbeats"], receiving["small"]]
        self.large_requests = LargeRequests(receiving["publishes"], others, lambda: publishes.held_bytes)

    def _wraps(self, method: str, handler: Handler) -> bool:
        return True

    def _replacement(self, method: str, handler: Handler) -> Handler:
        behaviour = behaviour_of(handler)
        own = getattr(behaviour, "experimental_thread_pool", None)
        if not handler.request_streaming and handler.request_deserializer is not None:
            behaviour = _parsing(method, handler, self._limits)
        pool = self._pools[pool_of(method)] if own is None else own
        return made_handler(
            handler,
            in_pool(behaviour, pool),
            request_deserializer=None,
            response_serializer=handler.response_serializer,
        )

    def pools(self) -> dict[str, CallPool]:
        """The threads of all kinds, by name."""
        return dict(self._pools)

    def close(self) -> None:
        """Ends the threads, after the calls that they answer. Idempotent."""
        self.large_requests.stop()
        for pool in self._pools.values():
            pool.shutdown()


def in_pool(behaviour: Callable[..., Any], pool: ThreadPoolExecutor) -> Callable[..., Any]:
    """Has grpcio run a function that answers calls in these threads."""

    @functools.wraps(behaviour)
    def call(request: Any, context: grpc.ServicerContext, *send: Any) -> Any:
        return behaviour(request, context, *send)

    call.experimental_thread_pool = pool  # type: ignore[attr-defined] # grpcio reads the attribute
    return call


def _parsing(method: str, handler: Handler, limits: ServerLimits) -> Callable[..., Any]:
    """The handler's function for requests as bytes, which it parses, unless there are too many of them."""
    behaviour, parse = behaviour_of(handler), handler.request_deserializer
    assert parse is not None  # noqa: S101 - asked before
    most_bytes = "publish_bytes" if method == _PUBLISH else "request_bytes"

    def parsed(taken: bytes | Request, context: grpc.ServicerContext) -> Any:
        request = taken.take() if isinstance(taken, Request) else taken
        if len(request) > getattr(limits, most_bytes):
            reason = limits.refusal(most_bytes, f"this request of {method} has {len(request)} bytes")
            refuse(context, grpc.StatusCode.RESOURCE_EXHAUSTED, reason)
        if len(request) > COUNTED_FROM_BYTES and has_more_messages(
            request, parse(b"").DESCRIPTOR, limits.request_parts
        ):
            reason = limits.refusal("request_parts", f"this request of {method} has more parts (entries of lists)")
            refuse(context, grpc.StatusCode.RESOURCE_EXHAUSTED, reason)
        whole = [request]
        del request
        try:
            return parse(whole.pop())  # nobody else has it: a parser that needs it no more frees it
        except Exception as error:  # noqa: BLE001 - whatever a parser raises
            refuse(context, grpc.StatusCode.INTERNAL, f"the request of {method} cannot be parsed: {error}")

    if is_without_thread(behaviour):

        @functools.wraps(behaviour)
        def begin(request: bytes | Request, context: grpc.ServicerContext, send: Any) -> None:
            behaviour(parsed(request, context), context, send)

        return begin

    if handler.response_streaming:

        def answers(request: bytes | Request, context: grpc.ServicerContext) -> Any:
            yield from behaviour(parsed(request, context), context)

        return answers

    def answer(request: bytes | Request, context: grpc.ServicerContext) -> Any:
        return behaviour(parsed(request, context), context)

    return answer

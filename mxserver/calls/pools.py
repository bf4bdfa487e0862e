"""Threads for calls, by kind: publishes that wait for a disk keep no heartbeat and no listing from its threads.

In one pool for all they did, until live workers counted as dead (tests/server/services/test_call_pools.py).
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import grpc

from mxserver.calls.handlers import Handler, HandlerInterceptor, behaviour_of, with_behaviour

_P2P = "/model_express.p2p.P2pService/"
_MODELS = "/model_express.model.ModelService/"
_CACHE = "/model_express.mx.CacheService/"

POOLS: dict[str, tuple[int, frozenset[str]]] = {
    "heartbeats": (16, frozenset({f"{_P2P}UpdateStatus"})),
    # As many may wait as one commit of the disk can take.
    "publishes": (64, frozenset({f"{_P2P}PublishMetadata"})),
    "health": (4, frozenset({"/model_express.health.HealthService/GetHealth", "/grpc.health.v1.Health/Check"})),
    "listings": (16, frozenset({f"{_P2P}ListSources", f"{_P2P}GetMetadata"})),
    "validations": (8, frozenset({f"{_CACHE}ValidateModel"})),  # each reads a whole model
    "models": (16, frozenset()),  # the cache's other calls, and what models have beside their streams
}
"""Name -> threads, and the methods that are answered there. What is named nowhere has the server's own pool."""

OTHER_THREADS = 16
"""Of the server's own pool."""


def pool_of(method: str) -> str | None:
    """The name of the pool in which a method is answered; None: the server's own."""
    named = next((name for name, (_, methods) in POOLS.items() if method in methods), None)
    return "models" if named is None and method.startswith((_CACHE, _MODELS)) else named


def threads_of(method: str) -> int:
    """How many threads answer a method, or more: those of a pool of its own are not known here."""
    return POOLS.get(pool_of(method) or "", (OTHER_THREADS, None))[0]


class CallPool(ThreadPoolExecutor):
    """Threads that answer calls, and how many calls wait for one. Thread-safe."""

    def __init__(self, threads: int, name: str) -> None:
        super().__init__(threads, f"call-{name}")
        self.name = name
        self._counting = threading.Lock()
        self._waiting = 0

    def waiting(self) -> int:
        """Calls that no thread has begun to answer."""
        return self._waiting

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        with self._counting:
            self._waiting += 1
        try:
            return super().submit(self._begin, fn, *args, **kwargs)
        except BaseException:  # the pool is shut down
            self._begun()
            raise

    def _begin(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        self._begun()
        return fn(*args, **kwargs)

    def _begun(self) -> None:
        with self._counting:
            self._waiting -= 1


class PoolInterceptor(HandlerInterceptor):
    """Has calls answered in the threads of their kind. A method that brings a pool of its own keeps that.

    The last of the interceptors, so that the others' wrappers are around what it makes. Thread-safe. `close` after
    the server has stopped.
    """

    def __init__(self) -> None:
        super().__init__()
        self._pools = {name: CallPool(threads, name) for name, (threads, _) in POOLS.items()}

    def _wraps(self, method: str, handler: Handler) -> bool:
        return pool_of(method) is not None and not hasattr(behaviour_of(handler), "experimental_thread_pool")

    def _replacement(self, method: str, handler: Handler) -> Handler:
        return with_behaviour(handler, in_pool(behaviour_of(handler), self._pools[str(pool_of(method))]))

    def pools(self) -> tuple[CallPool, ...]:
        return tuple(self._pools.values())

    def close(self) -> None:
        """Ends the threads, after the calls that they answer. Idempotent."""
        for pool in self._pools.values():
            pool.shutdown()


def in_pool(behaviour: Callable[..., Any], pool: ThreadPoolExecutor) -> Callable[..., Any]:
    """Has grpcio run a function that answers calls in these threads."""

    @functools.wraps(behaviour)
    def call(request: Any, context: grpc.ServicerContext) -> Any:
        return behaviour(request, context)

    call.experimental_thread_pool = pool  # type: ignore[attr-defined] # grpcio reads the attribute
    return call

"""The running server: services on a port, a ticker that sweeps the store, and a drain at the end."""

from __future__ import annotations

import contextlib
import functools
import logging
import resource
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import grpc
from grpc_health.v1 import health_pb2_grpc as standard_health_pb2_grpc

from mxserver.calls import AnswersUnderWay, PoolInterceptor, StalledStreams, give_large_parts_back
from mxserver.files_port import FilesPort
from mxserver.models import CacheSettings, OpenCache, SharedLocks
from mxserver.models.cache import Limits
from mxserver.operations import Operations
from mxserver.periodic import Periodic
from mxserver.security import Authenticator, setup
from mxserver.services import (
    ApiService,
    CacheService,
    DrainInterceptor,
    FleetService,
    HealthService,
    ModelService,
    P2pService,
    ProbeService,
    StandardHealth,
    WatchService,
    update_waits,
)
from mxserver.settings import ServerSettings
from mxserver.store import Clock, HeardClock, Leases, MemoryStore, SourceStore, SqliteStore, StoreUnavailable
from mxserver.telemetry import LoadHistory, ServerObservation
from mxserver.waiting import StorageElections, Watches
from mxserver.wire import MxError
from mxserver.wire.credentials import certificate_not_after
from mxserver.wire.proto import api_pb2_grpc, cache_pb2_grpc, health_pb2_grpc, mx_pb2_grpc

_LOG = logging.getLogger("mxserver")

OTHER_THREADS = 2  # for what no interceptor of ours stands before; all methods have pools by kind (calls/pools.py)

EXIT_CODE_MUST_END = 70  # EX_SOFTWARE of sysexits.h

SWITCH_SECONDS = 0.001  # between threads that compute: a heartbeat waits so long for each of them, a few times
LONGEST_TICK_SECONDS = 1.0
MOST_FILES = 1_048_576


class PortUnavailable(MxError):
    """The server cannot listen where it was told to."""

    code = "MX_PORT_UNAVAILABLE"


def open_store(settings: ServerSettings, clock: Clock | None = None) -> SourceStore:
    """The store that the settings ask for. Redis has a clock of its own. Raises StoreUnusable."""
    leases = Leases(settings.heartbeat_timeout_seconds, settings.gc_timeout_seconds)
    if settings.store == "redis":
        from mxserver.store.redis import RedisStore  # needs a package that other stores do not

        return RedisStore(settings.effective_redis_url, leases, limits=settings.limits)
    if settings.store == "memory":
        return MemoryStore(leases, clock, settings.limits)
    return SqliteStore(settings.store_path, leases, clock, settings.limits)


def open_history(settings: ServerSettings) -> LoadHistory:
    """The last loads of each model: in a file beside the SQLite store, with other stores in memory."""
    path = settings.store_path
    return LoadHistory(path.with_name(f"{path.stem}-loads{path.suffix}") if settings.store == "sqlite" else None)


def cache_settings(settings: ServerSettings) -> CacheSettings:
    """What the settings say about the model cache."""
    return CacheSettings(
        settings.cache_directory,
        Limits(settings.cache_max_bytes, settings.cache_min_free_bytes),
        settings.cache_lease_seconds,
        settings.file_sources,
        settings.model_sources,
        ignore=_ignored(settings.download_ignore),
        allow=settings.download_allow,
        shared_locks=_shared_locks(settings),
    )


def _shared_locks(settings: ServerSettings) -> SharedLocks | None:
    """Locks of the servers that share Redis; None without it."""
    if settings.store != "redis":
        return None
    from mxserver.store.redis import RedisLocks

    return RedisLocks(settings.effective_redis_url)


def _ignored(patterns: tuple[str, ...]) -> tuple[str, ...] | None:
    """The patterns of MX_DOWNLOAD_IGNORE; None is auto."""
    return None if patterns == ("auto",) else () if patterns == ("none",) else patterns


class Server:
    """A server that listens, over a store that it owns.

    The constructor returns once calls are answered; `close` must be called. Thread-safe.
    """

    def __init__(self, settings: ServerSettings, before_answering: Callable[[], None] = lambda: None) -> None:
        """`before_answering` is called when all is ready for the first call.

        Raises StoreUnusable, PortUnavailable, SettingError; CacheUnusable for a cache folder that was asked for.
        """
        judge, credentials = setup.authenticator(settings), setup.credentials(settings)
        guards = setup.interceptors(settings, judge)
        require_free_port(settings.host, settings.port)
        self._drain_seconds = settings.drain_seconds
        self._tick_seconds = min(LONGEST_TICK_SECONDS, settings.heartbeat_timeout_seconds / 4)
        self._draining = DrainInterceptor()
        self._refuses = False  # new calls, heartbeats among them: from then on nobody's lease may run out here
        self._stalled = StalledStreams()
        self._answers = AnswersUnderWay(settings.limits)
        self._tls = settings.tls
        self._health = StandardHealth()
        self._clock = HeardClock(settings.heartbeat_timeout_seconds)
        store = open_store(settings, self._clock)
        leases = Leases(settings.heartbeat_timeout_seconds, settings.gc_timeout_seconds)
        history = open_history(settings)
        try:
            self._operations = Operations(
                store, lease_seconds=leases.heartbeat_seconds, traces=settings.traces, history=history
            )
        except BaseException:
            history.close()
            store.close()
            raise
        self._store: SourceStore = self._operations.store
        self._elections = StorageElections(self._store.turns)
        self._watches = Watches(self._store, self._elections, self._operations.doubts.newest, settings.limits)
        self._pools = PoolInterceptor(functools.partial(update_waits, self._store), settings.limits)
        self._cache = OpenCache(cache_settings(settings), self._health.show_cache, self._operations.download_ended)
        self._operations.show_cache(self._cache)
        self._files: FilesPort | None = None
        self._models = ModelService(self._cache)
        try:
            self._files = self._listen_for_files(settings, judge)
            self._models.files_port = self._files.port if self._files else 0
            if "cache_directory" in settings.model_fields_set:
                self._cache.open()
            self._grpc = self._serve(settings, leases, guards)
            self.port = _bind(self._grpc, settings.host, settings.port, credentials)
            own = f"unix-abstract:mxserver-{secrets.token_hex(16)}"  # for readiness: nobody can use it up
            self._grpc.add_insecure_port(own)
            self.metrics_port = self._listen_http(settings, judge)
            before_answering()
        except BaseException:
            if self._files is not None:
                self._files.stop()
            self._operations.close()
            self._cache.close()
            self._models.close()
            self._store.close()
            raise
        self._ticker = Periodic("ticker", self._tick_seconds, self._tick)
        self._looker = Periodic("readiness", self._tick_seconds, self._look)
        self._grpc.start()
        if self._files is not None:
            self._files.start()
        self._operations.readiness.connect(own, self._clock.heard)
        self._operations.readiness.look()
        self._ticker.start()
        self._pools.large_requests.start()
        self._looker.start()
        self._stalled.start()
        self._watches.start()
        self._operations.open()

    def _listen_http(self, settings: ServerSettings, judge: Authenticator | None) -> int | None:
        port = settings.effective_metrics_port
        if port is None:
            return None
        facts = {"store": settings.store, "port": self.port}
        try:
            return self._operations.listen(
                _unbracketed(settings.host),
                port,
                facts,
                tls=setup.metrics_tls(settings),
                authenticator=judge,
                look_at_server=self._observation,
                names=settings.metrics_hosts,
            )
        except OSError as error:
            raise PortUnavailable(
                f"cannot listen on {address(settings.host, port)} for probes, metrics and the status page "
                f"({error.strerror}); stop what listens there, or choose with --metrics-port (port 0 takes a free one)"
            ) from error

    def _observation(self) -> ServerObservation:
        pools = {**self._pools.pools(), **self._models.pools()}
        return ServerObservation(
            {name: pool.unanswered for name, pool in pools.items()},
            certificate_not_after(self._tls.cert_file) if self._tls is not None else None,
        )

    def _listen_for_files(self, settings: ServerSettings, judge: Authenticator | None) -> FilesPort | None:
        port = settings.effective_files_port
        if port is None:
            return None
        try:
            return FilesPort(
                _unbracketed(settings.host),
                port,
                self._cache,
                tls=settings.tls,
                authenticator=judge,
                most_per_host=settings.limits.streams_per_client,
            )
        except OSError as error:
            raise PortUnavailable(
                f"cannot listen on {address(settings.host, port)} for files ({error.strerror}); stop what listens "
                "there, or choose with --files-port (port 0 takes a free one; off: files come over gRPC alone)"
            ) from error

    def _serve(self, settings: ServerSettings, leases: Leases, guards: list[grpc.ServerInterceptor]) -> grpc.Server:
        threads = ThreadPoolExecutor(OTHER_THREADS, thread_name_prefix="call")
        server = grpc.server(
            threads,
            interceptors=[
                *self._operations.interceptors,
                self._draining,
                *guards,
                self._stalled,
                self._answers,
                self._pools,
            ],
            options=setup.server_options(settings),
            maximum_concurrent_rpcs=settings.limits.calls,
        )
        loads, doubts, refusals = self._operations.loads, self._operations.doubts, self._operations.refusals
        changed = self._watches.record_changed
        P2pService(self._store, leases, loads, settings.limits, self._answers, changed).add_to(server)
        mx_pb2_grpc.add_FleetServiceServicer_to_server(
            FleetService(self._store, self._elections, doubts, refusals, self._clock, self._watches.changed), server
        )
        WatchService(self._watches, settings.limits).add_to(server)
        health_pb2_grpc.add_HealthServiceServicer_to_server(
            HealthService(lambda: self._operations.readiness.store_problem), server
        )
        api_pb2_grpc.add_ApiServiceServicer_to_server(ApiService(), server)
        standard_health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        ProbeService(self._store).add_to(server)
        self._models.add_to(server)
        cache_pb2_grpc.add_CacheServiceServicer_to_server(CacheService(self._cache), server)
        return server

    def leave(self) -> None:
        """Reports "not ready" for good, and goes on answering. Idempotent."""
        self._operations.leave()
        self._health.drain()

    def drain(self) -> threading.Event:
        """Refuses new calls. The event is set when calls and answers have ended, or were cut at the time-out."""
        self.leave()
        self._refuses = True
        self._draining.drain()
        self._watches.drain()
        self._cache.stop_downloads()
        calls: threading.Event = self._grpc.stop(self._drain_seconds)
        if self._files is None:
            return calls
        files, stopped = self._files, threading.Event()
        files.drain()

        def wait() -> None:
            files.wait(self._drain_seconds)
            calls.wait()
            stopped.set()

        threading.Thread(target=wait, name="drain", daemon=True).start()
        return stopped

    def close(self) -> None:
        """Cuts running calls, and releases ports and store. Idempotent."""
        self.leave()
        self._cache.stop_downloads()
        if self._files is not None:
            self._files.stop()
        self._looker.stop()
        self._watches.stop()
        self._grpc.stop(0).wait()
        self._stalled.stop()
        self._pools.close()
        self._models.close()
        self._cache.close()
        self._ticker.stop()
        self._operations.close()
        self._store.close()

    @property
    def must_end(self) -> bool:
        """Whether the server cannot work again without a restart."""
        return self._operations.readiness.must_end.is_set()

    def _tick(self) -> None:
        """Sweeps the store, unless heartbeats cannot be heard at the moment."""
        if self._refuses or not self._operations.readiness.hears:
            return
        with contextlib.suppress(StoreUnavailable):  # readiness tells of it
            expired, deleted = self._store.sweep()
            if expired or deleted:
                _LOG.info("swept stale=%d deleted=%d", expired, deleted)

    def _look(self) -> None:
        """Finds out whether the server is ready; gRPC's health service says the same as the HTTP probes."""
        readiness = self._operations.readiness
        readiness.look()
        supervised = (self._ticker, self._watches, self._pools.large_requests)
        problem = readiness.not_ready() or next((one.problem for one in supervised if one.problem), None)
        self._health.show_store(works=problem is None)


def require_free_port(host: str, port: int) -> None:
    """Raises PortUnavailable with the system's reason, which gRPC does not give.

    Before a store is opened: who starts a second server by mistake does no more than that.
    """
    try:
        places = socket.getaddrinfo(_unbracketed(host), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, kind, protocol, _, place in places:
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(place)
                probe.listen(1)
    except OSError as error:
        raise PortUnavailable(
            f"cannot listen on {address(host, port)} ({error.strerror}); stop what listens there, or choose with "
            "--host and --port (port 0 takes a free one)"
        ) from error


def address(host: str, port: int) -> str:
    """host:port, with brackets around an IPv6 address."""
    host = _unbracketed(host)
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _unbracketed(host: str) -> str:
    return host.removeprefix("[").removesuffix("]")


def _bind(server: grpc.Server, host: str, port: int, credentials: grpc.ServerCredentials | None) -> int:
    try:
        if credentials is not None:
            return int(server.add_secure_port(address(host, port), credentials))
        return int(server.add_insecure_port(address(host, port)))
    except RuntimeError as error:
        raise PortUnavailable(
            f"cannot listen on {address(host, port)}; choose with --host and --port (port 0 takes a free one)"
        ) from error


class Signals:
    """SIGTERM and SIGINT, in the order of their arrival, from `listen` on. Used in the main thread.

    Waiting uses a socket that Python's signal handler writes to. A wait for a lock would miss a signal that arrives
    just before it, or in another thread.
    """

    def __init__(self) -> None:
        self._received: list[int] = []
        self._ear, self._mouth = socket.socketpair()
        self._mouth.setblocking(False)

    def listen(self) -> None:
        """Until then, a signal ends the process at once."""
        signal.set_wakeup_fd(self._mouth.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, _: self._received.append(number))

    def wait(self, count: int, timeout_seconds: float | None = None) -> bool:
        """Waits for this many signals. Returns False if the time is over first."""
        deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        while len(self._received) < count:
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                return False
            self._ear.settimeout(left)
            with contextlib.suppress(TimeoutError):
                self._ear.recv(64)
        return True

    def __getitem__(self, index: int) -> signal.Signals:
        return signal.Signals(self._received[index])

    def close(self) -> None:
        """Stops listening for signals."""
        signal.set_wakeup_fd(-1)
        self._ear.close()
        self._mouth.close()


def raise_file_limit() -> None:
    """Raises this process' limit of open files as far as allowed: each connection is one, and 1024 is a usual limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def run(settings: ServerSettings) -> int:
    """Serves until SIGTERM or SIGINT, then drains; a second signal ends it at once. Returns the exit code."""
    raise_file_limit()
    give_large_parts_back()
    sys.setswitchinterval(SWITCH_SECONDS)
    signals = Signals()
    try:
        server = Server(settings, signals.listen)  # a call that it answers is one that a signal lets end
    except BaseException:
        signals.close()
        raise
    place = settings.store_path if settings.store == "sqlite" else settings.store
    if warning := setup.warning(settings):
        _LOG.warning("%s", warning)
    scheme = "http" if setup.metrics_tls(settings) is None else "https"
    if server.metrics_port is None:
        _LOG.info("no status page, metrics and HTTP probes: they are off (MODEL_EXPRESS_SERVER_METRICS_PORT=0)")
    else:
        _LOG.info("status page on %s://%s", scheme, address(settings.host, server.metrics_port))
    _LOG.info("listening on %s store=%s", address(settings.host, server.port), place)
    try:
        while not signals.wait(1, 1.0):
            if server.must_end:
                _LOG.critical("the server ends: it cannot work again without a restart")
                return EXIT_CODE_MUST_END
        server.leave()
        if settings.not_ready_seconds:
            _LOG.info("not ready signal=%s seconds=%g", signals[0].name, settings.not_ready_seconds)
            signals.wait(2, settings.not_ready_seconds)
        _LOG.info("draining signal=%s seconds=%g", signals[0].name, settings.drain_seconds)
        stopped = server.drain()
        while not stopped.wait(0.05):
            if signals.wait(2, 0):
                _LOG.warning("cut signal=%s; calls that ran are lost", signals[1].name)
                return 128 + signals[1]
    finally:
        server.close()
        signals.close()
    _LOG.info("stopped")
    return 0

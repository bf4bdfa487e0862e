"""Streams of workers that wait: what they are told, when, and that none costs a thread or holds up anybody."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import grpc
import pytest

from mxserver.calls import PushedStream
from mxserver.security import setup
from mxserver.server import Server
from mxserver.settings import load_settings
from mxserver.store import MemoryStore, RecordKey, SourceRecord
from mxserver.waiting import StorageElections, TooManyWatches, Watches, nearest
from mxserver.waiting.watches import UNREAD_SECONDS
from mxserver.wire import MethodMissing, ServerRefused, ServerUnreachable, WireError
from mxserver.wire.calls import OpenWatch, ServerClient, source_id
from mxserver.wire.proto import mx_pb2, p2p_pb2, watch_pb2, watch_pb2_grpc
from tests.server.redis_process import shared_redis

IDENTITY = p2p_pb2.SourceIdentity(model_name="test/watched")
SOURCE = source_id(IDENTITY)
READY, STARTING, STALE = (
    p2p_pb2.SOURCE_STATUS_READY,
    p2p_pb2.SOURCE_STATUS_INITIALIZING,
    p2p_pb2.SOURCE_STATUS_STALE,
)


@pytest.fixture(scope="module")
def shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    path = str(tmp_path_factory.mktemp("watches") / "state.sqlite3")
    running = Server(load_settings({"host": "127.0.0.1", "port": "0", "store_path": path}))
    yield running
    running.close()


@pytest.fixture
def shared(shared_server: Server) -> Iterator[ServerClient]:
    with ServerClient(f"127.0.0.1:{shared_server.port}") as opened:
        yield opened


@pytest.fixture
def watch(shared: ServerClient) -> Iterator[Callable[..., Iterator[watch_pb2.SourcesNow]]]:
    opened: list[OpenWatch] = []

    def begin(
        worker: str, *, rank: int = 0, turn: bool = False, source: str = SOURCE
    ) -> Iterator[watch_pb2.SourcesNow]:
        request = watch_pb2.WatchSourcesRequest(
            mx_source_id=SOURCE, worker_rank=rank, worker_id=worker, wants_turn=turn
        )
        opened.append(shared.watch_sources(request))
        return iter(opened[-1])

    yield begin
    for each in opened:
        each.cancel()


def publish(
    client: ServerClient, worker: str, status: p2p_pb2.SourceStatus.ValueType, *, endpoint: str = "", rank: int = 0
) -> int:
    record = p2p_pb2.WorkerMetadata(worker_rank=rank, status=status, worker_grpc_endpoint=endpoint)
    return client.publish(IDENTITY, record, worker).epoch


def until(news: Iterator[watch_pb2.SourcesNow], fits: Callable[[watch_pb2.SourcesNow], bool]) -> watch_pb2.SourcesNow:
    return next(now for now in news if fits(now))


def names(refs: object) -> set[str]:
    return {ref.worker_id for ref in refs}  # type: ignore[attr-defined]


def test_a_worker_hears_who_serves_and_who_leaves(
    shared: ServerClient, watch: Callable[..., Iterator[watch_pb2.SourcesNow]]
) -> None:
    news = watch("asks")
    assert not next(news).ready
    publish(shared, "asks", STARTING)
    publish(shared, "relay", STARTING, endpoint="h:1")
    [relay] = until(news, lambda now: bool(now.receiving)).receiving
    assert (relay.worker_id, relay.worker_grpc_endpoint) == ("relay", "h:1")
    publish(shared, "relay", READY, endpoint="h:1")
    now = until(news, lambda now: bool(now.ready))
    assert (names(now.ready), names(now.receiving)) == ({"relay"}, set())
    publish(shared, "other", READY, endpoint="h:2", rank=1)  # another rank: nothing is said of it
    shared.update_status(SOURCE, "relay", 0, STALE)
    now = until(news, lambda now: not now.ready)
    assert not now.receiving


def test_who_waits_is_not_woken_for_workers_that_only_receive(
    shared: ServerClient, watch: Callable[..., Iterator[watch_pb2.SourcesNow]]
) -> None:
    rank = 6
    waits, receives = watch("waits", rank=rank, turn=True), watch("receives", rank=rank)
    next(waits)
    next(receives)
    publish(shared, "relay", STARTING, endpoint="h:1", rank=rank)
    until(receives, lambda now: bool(now.receiving))
    publish(shared, "reads", READY, endpoint="h:2", rank=rank)
    told = []
    for now in waits:
        told.append(now)
        if now.ready:
            break
    assert [names(now.receiving) for now in told if not now.ready] == [set()] * (len(told) - 1)
    assert names(told[-1].receiving) == {"relay"}  # to receive from as well


def test_receivers_are_told_of_different_ones_by_place_and_load() -> None:
    def record(name: str, rack: str = "r1", load: float = 0.0) -> SourceRecord:
        key = RecordKey(SOURCE, name, 0)
        place = {"rack": rack, "host": name}
        return SourceRecord(key, READY, 1, 1, 0, b"", b"", "m", "cpu", place, source_load=load)

    equals = [record(f"w{n}") for n in range(64)]
    chosen = [nearest(equals, f"asker{n}", {"rack": "r1"}, ("rack",), 8) for n in range(1600)]
    first = Counter(found[0].key.worker_id for found in chosen)
    any_of = Counter(each.key.worker_id for found in chosen for each in found)
    assert len(first) == 64
    assert max(first.values()) < 3 * 1600 / 64
    assert max(any_of.values()) < 2 * 8 * 1600 / 64
    assert nearest(equals, "asker7", {"rack": "r1"}, ("rack",), 8) == chosen[7]  # the same ones when asked again
    mixed = [record("far", "r2"), record("busy", load=3.0), record("near"), record("asker0", "r3")]
    found = nearest(mixed, "asker0", {"rack": "r1", "host": "asker0"}, ("rack", "host"), 4)
    assert [each.key.worker_id for each in found] == ["asker0", "near", "busy", "far"]


def test_one_at_a_time_is_told_to_ask_for_the_turn(
    shared: ServerClient, watch: Callable[..., Iterator[watch_pb2.SourcesNow]]
) -> None:
    rank = 2
    first = watch("first", rank=rank, turn=True)
    assert next(first).ask_turn
    second = watch("second", rank=rank, turn=True)
    assert not next(second).ask_turn
    answer = shared.take_storage_turn(SOURCE, rank, "first")
    assert answer.turn == mx_pb2.STORAGE_TURN_YOURS
    assert until(second, lambda now: bool(now.reader_worker_id)).reader_worker_id == "first"
    shared.end_storage_turn(SOURCE, rank, "first", answer.epoch, shared=True)
    assert until(second, lambda now: now.ask_turn).reader_worker_id == ""  # within ASKED_SECONDS


def test_what_cannot_be_shared_is_read_by_everybody(
    shared: ServerClient, watch: Callable[..., Iterator[watch_pb2.SourcesNow]]
) -> None:
    rank = 3
    turn = shared.take_storage_turn(SOURCE, rank, "reads")
    waiting = [watch(f"waits{n}", rank=rank, turn=True) for n in range(3)]
    assert [next(news).reader_worker_id for news in waiting] == ["reads"] * 3
    shared.end_storage_turn(SOURCE, rank, "reads", turn.epoch, shared=False)
    for news in waiting:
        until(news, lambda now: now.ask_turn)


def test_doubts_are_told(shared: ServerClient, watch: Callable[..., Iterator[watch_pb2.SourcesNow]]) -> None:
    news = watch("asks", rank=4)
    next(news)
    shared.tell_doubt(mx_pb2.Doubt(mx_source_id=SOURCE, worker_rank=4, worker_id="a", holders=["b"], text="differ"))
    [doubt] = until(news, lambda now: bool(now.doubts)).doubts
    assert (list(doubt.holders), doubt.text) == (["b"], "differ")


def test_a_hundred_streams_hold_no_thread(
    shared: ServerClient, shared_server: Server, watch: Callable[..., Iterator[watch_pb2.SourcesNow]]
) -> None:
    next(watch("warm", rank=5))
    with ExitStack() as opened:
        # Streams without an iterating thread on this side either: the first message says that each has begun.
        channel = opened.enter_context(grpc.insecure_channel(f"127.0.0.1:{shared_server.port}"))
        stub = watch_pb2_grpc.WatchServiceStub(channel)
        for n in range(100):
            stream = stub.WatchSources(
                watch_pb2.WatchSourcesRequest(mx_source_id=SOURCE, worker_rank=5, worker_id=f"w{n}")
            )
            opened.callback(stream.cancel)
            next(stream)
        assert len([t for t in threading.enumerate() if t.name.startswith("call-watches")]) <= 4
        publish(shared, "serves", READY, endpoint="h:9", rank=5)  # heartbeats and publishes go on
        assert shared_server._watches.open_streams >= 100


def test_a_draining_server_ends_streams_as_unavailable(server: Server, client: ServerClient) -> None:
    news = iter(client.watch_sources(watch_pb2.WatchSourcesRequest(mx_source_id=SOURCE, worker_id="w")))
    next(news)
    ended = server.drain()
    with pytest.raises(ServerUnreachable, match="draining"):
        list(news)
    assert ended.wait(60)


def test_a_connection_ends_some_time_and_what_is_open_on_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that revoked certificates come to an end, and replicas share the load: after an hour, here after a second."""
    monkeypatch.setattr(setup, "LONGEST_CONNECTION_SECONDS", 1)
    running = Server(load_settings({"host": "127.0.0.1", "port": "0", "store_path": str(tmp_path / "s")}))
    left = threading.Event()
    states: list[grpc.ChannelConnectivity] = []

    def see(state: grpc.ChannelConnectivity) -> None:
        states.append(state)
        if grpc.ChannelConnectivity.READY in states[:-1]:
            left.set()

    try:
        with (
            grpc.insecure_channel(f"127.0.0.1:{running.port}") as channel,
            ServerClient(f"127.0.0.1:{running.port}") as client,
        ):
            channel.subscribe(see)
            request = watch_pb2.WatchSourcesRequest(mx_source_id=SOURCE, worker_id="w")
            news = watch_pb2_grpc.WatchServiceStub(channel).WatchSources(request)
            assert not next(news).ready
            assert left.wait(120)
            publish(client, "other", READY, endpoint="h:1")
            assert names(until(news, lambda now: bool(now.ready)).ready) == {"other"}
            news.cancel()
    finally:
        running.close()


def test_requests_without_names_are_refused(watch: Callable[..., Iterator[watch_pb2.SourcesNow]]) -> None:
    with pytest.raises(ServerRefused, match="missing"):
        next(watch(""))


def test_streams_have_a_limit_for_each_host(tmp_path: Path) -> None:
    settings = {"host": "127.0.0.1", "port": "0", "store_path": str(tmp_path / "s"), "limits": "watches_per_client=2"}
    running = Server(load_settings(settings))
    try:
        with ServerClient(f"127.0.0.1:{running.port}") as client:
            request = watch_pb2.WatchSourcesRequest(mx_source_id=SOURCE, worker_id="w")
            opened = [client.watch_sources(request) for _ in range(2)]
            for each in opened:
                next(iter(each))
            with pytest.raises(ServerRefused, match="watches_per_client=2"):
                next(iter(client.watch_sources(request)))
            opened[0].cancel()
            while running._watches.open_streams > 1:
                threading.Event().wait(0.01)
            again = client.watch_sources(request)
            next(iter(again))
            again.cancel()
    finally:
        running.close()


def test_what_one_replica_hears_is_told_by_the_other() -> None:
    common = {"host": "127.0.0.1", "port": "0", "store": "redis", "redis_url": shared_redis().url}
    servers = [Server(load_settings(common)) for _ in range(2)]
    identity = p2p_pb2.SourceIdentity(model_name="test/replicas")
    source = source_id(identity)
    try:
        with ExitStack() as opened:
            here, there = (opened.enter_context(ServerClient(f"127.0.0.1:{each.port}")) for each in servers)
            asks = [
                here.watch_sources(watch_pb2.WatchSourcesRequest(mx_source_id=source, worker_id=name, wants_turn=True))
                for name in ("a", "b")
            ]
            for each in asks:
                opened.callback(each.cancel)
            news = iter(asks[1])
            next(news)
            turn = there.take_storage_turn(source, 0, "reads")
            assert here.take_storage_turn(source, 0, "b").turn == mx_pb2.STORAGE_TURN_WAIT
            until(news, lambda now: now.reader_worker_id == "reads")
            record = p2p_pb2.WorkerMetadata(status=READY, worker_grpc_endpoint="h:1")
            there.publish(identity, record, "reads")
            there.end_storage_turn(source, 0, "reads", turn.epoch, shared=True)
            assert names(until(news, lambda now: bool(now.ready)).ready) == {"reads"}
            there.update_status(source, "reads", 0, STALE)
            until(news, lambda now: not now.ready)
    finally:
        for each in servers:
            each.close()


class _Unread:
    """A stream whose reader takes nothing."""

    def __init__(self) -> None:
        self.unread_seconds = 0.0
        self.pushed: list[bytes] = []
        self.was_cut = False

    def push(self, message: bytes) -> None:
        self.pushed.append(message)

    def end(self, status: grpc.StatusCode, reason: str) -> None:
        self.was_cut = True

    def cut(self) -> None:
        self.was_cut = True


def test_whoever_reads_nothing_is_cut_off() -> None:
    store = MemoryStore()
    watches = Watches(store, StorageElections(), lambda source: [])
    streams = [_Unread(), _Unread()]
    for n, stream in enumerate(streams):
        request = watch_pb2.WatchSourcesRequest(mx_source_id=SOURCE, worker_id=f"w{n}")
        watches.begin(request, "host", lambda ended, stream=stream: stream)  # type: ignore[misc]
    watches.look()
    streams[0].unread_seconds = UNREAD_SECONDS + 1
    watches.look()
    assert [stream.was_cut for stream in streams] == [True, False]
    assert [len(stream.pushed) for stream in streams] == [1, 1]  # nothing is said twice
    watches.stop()
    with pytest.raises(TooManyWatches, match="draining"):
        watches.begin(watch_pb2.WatchSourcesRequest(mx_source_id=SOURCE), "host", lambda ended: _Unread())


def test_records_that_cannot_be_read_are_looked_at_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The log says so at debug level alone: readiness tells of the store, and each look would say it again."""
    store, stream = MemoryStore(), _Unread()
    watches = Watches(store, StorageElections(), lambda source: [])
    watches.begin(watch_pb2.WatchSourcesRequest(mx_source_id=SOURCE, worker_id="w"), "host", lambda ended: stream)
    with monkeypatch.context() as patched, caplog.at_level(logging.DEBUG, "mxserver.waiting.watches"):
        patched.setattr(store, "_closed", True)
        watches.look()
    assert [record.levelname for record in caplog.records if "watched records cannot be read" in record.message] == [
        "DEBUG"
    ]
    assert not stream.pushed
    watches.look()
    assert len(stream.pushed) == 1
    watches.stop()


def test_a_reader_that_pauses_gets_the_newest_message(shared_server: Server) -> None:
    """Of what was pushed meanwhile one message waits, however many there were."""
    streams: list[PushedStream] = []
    begun = shared_server._watches.begin

    def keep(request: object, client: str, opens: Callable[[Callable[[], None]], PushedStream]) -> None:
        streams.append(opens(lambda: None))

    shared_server._watches.begin = keep  # type: ignore[assignment,method-assign]
    try:
        with grpc.insecure_channel(f"127.0.0.1:{shared_server.port}") as channel:
            stub = watch_pb2_grpc.WatchServiceStub(channel)
            news = stub.WatchSources(watch_pb2.WatchSourcesRequest(mx_source_id=SOURCE, worker_id="slow"))
            while not streams:
                threading.Event().wait(0.01)
            for n in range(2000):  # more than a connection's window
                text = watch_pb2.SourcesNow(reader_worker_id=f"{n:05d}" + "x" * 4000)
                streams[0].push(text.SerializeToString())
            got = []
            while not got or got[-1] != "01999":
                got.append(next(news).reader_worker_id[:5])
            assert got == sorted(got)
            assert len(got) < 1000
            news.cancel()
    finally:
        shared_server._watches.begin = begun  # type: ignore[method-assign]


def test_an_older_server_does_not_know_the_stream() -> None:
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with ServerClient(f"127.0.0.1:{port}") as client, pytest.raises(MethodMissing):
            next(iter(client.watch_sources(watch_pb2.WatchSourcesRequest(mx_source_id=SOURCE, worker_id="w"))))
    finally:
        server.stop(None).wait()
    assert issubclass(MethodMissing, WireError)

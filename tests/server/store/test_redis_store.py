"""The Redis store over a real Redis: kills, outages, replicas, and what it leaves behind."""

from __future__ import annotations

import logging
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from mxserver.store import Leases, Query, SourceStore, StoreUnavailable, UnknownRecord
from mxserver.store.errors import StoreEnded, StoreUnusable
from mxserver.store.redis import RedisStore, large_values, redis_link
from mxserver.store.redis import store as store_module
from mxserver.store.redis.large_values import PART_BYTES
from mxserver.store.redis.redis_link import RedisLink, place_of
from mxserver.store.redis.store import LINGER_SECONDS
from mxserver.wire import ServerUnreachable, SettingError, StaleEpoch
from mxserver.wire.calls import ServerClient, source_id
from mxserver.wire.proto import p2p_pb2
from tests.server.command.test_cli import mxserver
from tests.server.conftest import ROOT, ServerProcess
from tests.server.redis_process import LASTING, RedisProcess
from tests.server.stores import COLLECT_SECONDS, HEARTBEAT_SECONDS, LEASES, READY, STALE, HandClock, key, publication

IDENTITY = p2p_pb2.SourceIdentity(mx_version="mx-1", model_name="m")
SOURCE = source_id(IDENTITY)
WORKER = p2p_pb2.WorkerMetadata(nixl_metadata=b"agent")
Start = Callable[..., ServerProcess]


@pytest.fixture
def folder() -> Iterator[Path]:
    """Short, for the name of a socket may have 107 bytes."""
    made = Path(tempfile.mkdtemp(prefix="mx-redis-"))
    yield made
    shutil.rmtree(made)


@pytest.fixture
def redis_server(folder: Path) -> Iterator[RedisProcess]:
    """A Redis that keeps what it acknowledges."""
    started = RedisProcess(folder, *LASTING)
    yield started
    started.stop()


@pytest.fixture
def open_store(redis_server: RedisProcess) -> Iterator[Callable[..., RedisStore]]:
    opened: list[RedisStore] = []

    def open_one(leases: Leases = LEASES, clock: HandClock | None = None, linger_seconds: float = 0.005) -> RedisStore:
        opened.append(RedisStore(redis_server.url, leases, clock, linger_seconds=linger_seconds))
        return opened[-1]

    yield open_one
    for store in opened:
        store.close()


def until(condition: Callable[[], bool]) -> None:
    pause = threading.Event()
    for _ in range(12_000):
        if condition():
            return
        pause.wait(0.01)
    raise AssertionError("the condition did not come true within two minutes")


def works(store: SourceStore) -> bool:
    try:
        store.check()
    except StoreUnavailable:
        return False
    return True


# At start


def test_nothing_that_listens_is_unusable_and_says_what_to_do(folder: Path) -> None:
    with pytest.raises(StoreUnusable, match=r"redis\.sock cannot be used .*set REDIS_URL, or MX_REDIS_HOST"):
        RedisStore(f"unix://{folder}/redis.sock")


def test_wrong_password_is_unusable_and_not_shown(folder: Path) -> None:
    redis_server = RedisProcess(folder)
    with redis_server.client() as client:
        client.config_set("requirepass", "s3cret")
    try:
        with pytest.raises(StoreUnusable) as caught:
            RedisStore(redis_server.url.replace("unix://", "unix://:hunter2@"))
        assert "hunter2" not in str(caught.value)
        assert "cannot be used" in str(caught.value)
        RedisStore(redis_server.url.replace("unix://", "unix://:s3cret@")).close()
    finally:
        redis_server.stop()


def test_url_that_is_none_is_refused() -> None:
    with pytest.raises(SettingError, match="URL of Redis, http://host, is refused"):
        RedisLink("http://user:secret@host")


@pytest.mark.parametrize(
    ("url", "place"),
    [
        ("redis://u:p@h:1/2?x=secret", "redis://h:1/2"),
        ("rediss://:p@[::1]:1", "rediss://[::1]:1"),
        ("unix:///run/redis.sock?password=p", "unix:///run/redis.sock"),
    ],
)
def test_place_has_no_secret(url: str, place: str) -> None:
    assert place_of(url) == place


@pytest.mark.parametrize(("settings", "warned"), [((), True), (("--appendonly", "yes"), True), (LASTING, False)])
def test_redis_that_may_forget_is_warned_about(
    folder: Path, caplog: pytest.LogCaptureFixture, settings: tuple[str, ...], warned: bool
) -> None:
    redis_server = RedisProcess(folder, *settings)
    with caplog.at_level(logging.WARNING):
        RedisStore(redis_server.url).close()
    redis_server.stop()
    assert ("set appendonly yes and appendfsync always" in caplog.text) is warned


def test_server_without_the_package_says_what_to_install() -> None:
    program = "import sys; sys.modules['redis'] = None; from mxserver.cli import main; main(['--store', 'redis'])"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=ROOT)
    assert run.returncode == 2
    assert run.stderr.endswith("install it with pip install 'redis[hiredis]>=5' [MX_SETTING]\n")


# Outages


def test_outage_is_unavailable_with_the_reason_and_ends_by_itself(
    redis_server: RedisProcess, open_store: Callable[..., RedisStore]
) -> None:
    store = open_store()
    kept = store.publish(publication(status=READY))
    redis_server.kill()
    calls: list[Callable[[], object]] = [
        lambda: store.publish(publication(key("other"))),
        lambda: store.update_status(key(), READY),
        lambda: store.get(*key()[:2]),
        lambda: store.find(Query()),
        store.sweep,
        store.check,
    ]
    for call in calls:
        with pytest.raises(StoreUnavailable, match=r"Redis at unix://\S+ does not work: .*(onnect|closed|No such)"):
            call()
    redis_server.start()
    until(lambda: works(store))
    assert store.find(Query()) == [kept]


def test_close_while_redis_is_away_is_no_error(
    redis_server: RedisProcess, open_store: Callable[..., RedisStore]
) -> None:
    store = open_store()
    redis_server.kill()
    store.close()
    with pytest.raises(StoreUnavailable, match="shutting down"):
        store.check()


def test_while_it_is_away_one_tries_and_the_others_fail_at_once(
    redis_server: RedisProcess, open_store: Callable[..., RedisStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Redis that hangs does not bind all threads of the server for its time-out each."""
    monkeypatch.setattr(redis_link, "ANSWER_SECONDS", 0.3)
    store = open_store()
    assert redis_server.process is not None
    redis_server.process.send_signal(signal.SIGSTOP)
    try:
        with pytest.raises(StoreUnavailable, match=r"[Tt]imeout"):
            store.check()
        started = time.monotonic()
        refused = 0
        while refused < 1000 and time.monotonic() - started < 20:
            with pytest.raises(StoreUnavailable):
                store.check()
            refused += 1
        assert refused == 1000  # without the pauses this would be ten minutes
    finally:
        redis_server.process.send_signal(signal.SIGCONT)
    until(lambda: works(store))


def test_redis_that_does_not_write_is_unavailable_also_to_a_check(
    redis_server: RedisProcess, open_store: Callable[..., RedisStore]
) -> None:
    store = open_store()
    store.publish(publication())
    with redis_server.client() as client:
        client.config_set("min-replicas-to-write", 1)
        with pytest.raises(StoreUnavailable, match="NOREPLICAS"):
            store.check()
        client.config_set("min-replicas-to-write", 0)
    until(lambda: works(store))


def test_outage_of_redis_does_not_count_against_workers(
    redis_server: RedisProcess, open_store: Callable[..., RedisStore]
) -> None:
    """Redis is away for longer than the lease; afterwards a whole part of it is left."""
    leases = Leases(3.0, 60.0)
    store = open_store(leases)
    store.publish(publication(status=READY))
    store.publish(publication(key("left"), status=STALE))
    redis_server.kill()
    threading.Event().wait(3.5)  # the time itself is what is tested here
    redis_server.start()
    until(lambda: works(store))
    store.sweep()
    assert {record.key.worker_id: record.status for record in store.find(Query())} == {"w0": READY, "left": STALE}
    until(lambda: store.sweep() == (1, 0))
    assert {record.status for record in store.find(Query())} == {STALE}


def test_time_without_any_server_does_not_count_against_workers(open_store: Callable[..., RedisStore]) -> None:
    leases = Leases(1.0, 60.0)
    first = open_store(leases)
    first.publish(publication(status=READY))
    first.close()
    threading.Event().wait(1.5)  # the time itself is what is tested here
    second = open_store(leases)
    second.sweep()
    assert [record.status for record in second.find(Query())] == [READY]


# Replicas


def test_replicas_see_the_same_at_once(open_store: Callable[..., RedisStore]) -> None:
    clock = HandClock()
    one, two = open_store(clock=clock), open_store(clock=clock)
    first = one.publish(publication())
    assert two.find(Query()) == [first]
    two.update_status(key(), READY, epoch=first.epoch, source_load=0.5)
    record = one.get(*key()[:2])
    assert record is not None
    assert (record.status, record.source_load) == (READY, 0.5)
    second = two.publish(publication(nixl_metadata=b"newer"))
    with pytest.raises(StaleEpoch):
        one.update_status(key(), READY, epoch=first.epoch)
    found = one.get(*key()[:2])
    assert found is not None
    assert found.worker == second.worker
    clock.advance(HEARTBEAT_SECONDS)
    assert [store.find(Query())[0].status for store in (one, two)] == [STALE, STALE]
    assert (one.sweep(), two.sweep()) == ((1, 0), (0, 0))


def test_replica_that_joins_others_changes_no_lease(open_store: Callable[..., RedisStore]) -> None:
    clock = HandClock()
    one = open_store(clock=clock)
    one.publish(publication(status=READY))
    clock.advance(HEARTBEAT_SECONDS - 1)
    one.sweep()
    two = open_store(clock=clock)
    clock.advance(1)
    assert [record.status for record in two.find(Query())] == [STALE]


def test_replicas_share_no_epoch(open_store: Callable[..., RedisStore]) -> None:
    epochs: list[int] = []
    start = threading.Barrier(4)

    def publish(store: RedisStore, name: str) -> None:
        start.wait()
        epochs.extend(store.publish(publication(key(f"{name}-{n}"))).epoch for n in range(50))

    threads = [threading.Thread(target=publish, args=(open_store(), str(n))) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(epochs)) == 200


def test_epochs_grow_when_redis_has_lost_everything(
    redis_server: RedisProcess, open_store: Callable[..., RedisStore]
) -> None:
    store = open_store()
    old = store.publish(publication()).epoch
    with redis_server.client() as client:
        client.flushall()
    assert store.find(Query()) == []
    assert store.publish(publication()).epoch > old


def test_a_replica_that_was_stopped_extends_nobodys_lease(
    redis_server: RedisProcess, open_store: Callable[..., RedisStore]
) -> None:
    """One replica did nothing for most of a lease, while the other heard everybody: the dead are STALE in time."""
    clock = HandClock()
    slow, quick = open_store(clock=clock), open_store(clock=clock)
    slow.publish(publication(key("dead"), status=READY))
    quick.publish(publication(key("alive"), status=READY))
    for _ in range(round(HEARTBEAT_SECONDS) - 1):
        clock.advance(1)
        quick.sweep()
        quick.update_status(key("alive"), READY)
    slow.sweep()
    slow.check()
    clock.advance(1)
    assert {record.key.worker_id: record.status for record in slow.find(Query())} == {"dead": STALE, "alive": READY}
    with redis_server.client() as client:
        assert client.hget("mx:clock", "x") in (None, b"0")


# What it costs and leaves behind


def test_nothing_walks_all_keys(redis_server: RedisProcess, open_store: Callable[..., RedisStore]) -> None:
    clock = HandClock()
    store = open_store(clock=clock)
    for n in range(20):
        store.publish(publication(key(f"w{n}", source=f"{n % 4:016x}"), status=READY))
    for query in (Query(), Query(source_id="0" * 16, status=READY, limit=2), Query(model_name="Org/Model")):
        store.find(query)
    clock.advance(HEARTBEAT_SECONDS + COLLECT_SECONDS)
    store.sweep()
    with redis_server.client() as client:
        used = set(client.info("commandstats"))
    assert not used & {"cmdstat_keys", "cmdstat_scan", "cmdstat_sscan", "cmdstat_hscan"}


def test_heartbeat_is_two_small_writes(redis_server: RedisProcess, open_store: Callable[..., RedisStore]) -> None:
    clock = HandClock()
    store = open_store(clock=clock)
    store.publish(publication(status=READY, nixl_metadata=b"x" * 100_000))
    store.update_status(key(), READY)
    with redis_server.client() as client:
        before = client.info("persistence")["aof_current_size"]
        for _ in range(100):
            clock.advance(0.001)
            store.update_status(key(), READY)
        after = client.info("persistence")["aof_current_size"]
    assert (after - before) / 100 < 700


def test_updates_that_wait_together_are_one_write(
    redis_server: RedisProcess, open_store: Callable[..., RedisStore]
) -> None:
    """Also where one of them is refused: it spoils none of the others."""
    store = open_store(linger_seconds=LINGER_SECONDS)
    epochs = {f"w{n}": store.publish(publication(key(f"w{n}"))).epoch for n in range(16)}
    store.publish(publication(key("w3")))
    outcomes: dict[str, str] = {}
    start = threading.Barrier(17)

    def update(worker: str) -> None:
        start.wait()
        try:
            store.update_status(key(worker), READY, epoch=epochs.get(worker, 1))
            outcomes[worker] = "kept"
        except (StaleEpoch, UnknownRecord) as error:
            outcomes[worker] = type(error).__name__

    with redis_server.client() as client:
        client.config_resetstat()
        threads = [threading.Thread(target=update, args=(worker,)) for worker in [*epochs, "nobody"]]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        scripts_run = client.info("commandstats")["cmdstat_evalsha"]["calls"]
    assert outcomes == {**dict.fromkeys(epochs, "kept"), "w3": "StaleEpoch", "nobody": "UnknownRecord"}
    assert scripts_run <= 8
    assert {r.key.worker_id for r in store.find(Query(status=READY))} == set(epochs) - {"w3"}


def test_a_thread_of_updates_that_has_ended_ends_the_server(
    open_store: Callable[..., RedisStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody would notice: heartbeats would wait for it, and readiness would stay green."""
    store = open_store()
    store.check()
    store._updates._waiting.put(None)  # what ends it
    assert store._updates._thread is not None
    store._updates._thread.join()
    with pytest.raises(StoreEnded, match="restart mxserver"):
        store.check()


def test_more_updates_than_fit_together_are_all_answered(open_store: Callable[..., RedisStore]) -> None:
    store = open_store(linger_seconds=LINGER_SECONDS)
    store.publish(publication())
    threads = [threading.Thread(target=store.update_status, args=(key(), READY)) for _ in range(100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    store.close()
    with pytest.raises(StoreUnavailable, match="shutting down"):
        store.update_status(key(), READY)


def test_no_script_looks_at_more_than_some_hundred_records(
    open_store: Callable[..., RedisStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many there are, also for the first server after a time without any."""
    monkeypatch.setattr(store_module, "RECORDS_PER_SCRIPT", 5)
    clock = HandClock()
    store = open_store(clock=clock)
    for n in range(40):
        store.publish(publication(key(f"w{n}", source=f"{n % 2:016x}"), status=READY, model_name=f"m{n % 2}"))
    store.close()
    looked_at: list[int] = []
    run = RedisLink.run

    def counted(self: RedisLink, script: str, *arguments: str | bytes) -> object:
        looked_at.append(sum(isinstance(one, bytes) for one in arguments))
        return run(self, script, *arguments)

    monkeypatch.setattr(RedisLink, "run", counted)
    clock.advance(HEARTBEAT_SECONDS + 1)
    again = open_store(clock=clock)
    everybody = {f"w{n}" for n in range(40)}
    found = {record.key.worker_id for record in again.find(Query(status=READY))}
    assert found == everybody
    assert len(again.find(Query(source_id="0" * 16))) == len(again.find(Query(model_name="M1"))) == 20
    assert len(again.find(Query(source_id="0" * 16, status=READY, limit=3))) == 3
    assert len(again.find(Query(limit=7))) == 7
    clock.advance(HEARTBEAT_SECONDS + COLLECT_SECONDS)
    assert again.sweep()[1] == 40
    assert 0 < max(looked_at) <= 5


def test_large_metadata_is_fetched_for_who_asks_for_it_alone(open_store: Callable[..., RedisStore]) -> None:
    """A replica that lists what others published would else hold all of it: as much as the store may have."""
    one, other = open_store(), open_store()
    published = publication(nixl_metadata=bytes(1_000_000))
    one.publish(published)
    for replica in (one, other):
        [found] = replica.find(Query())
        assert found.worker_is_cut
        assert len(found.worker) < 100
        assert dict(found.topology) == {"zone": "a"}
        assert replica._payloads._bytes < 10_000
        assert replica.whole_worker(found) == published.worker
        assert replica._payloads._bytes < 10_000


def test_metadata_of_many_mib_goes_in_parts(redis_server: RedisProcess, open_store: Callable[..., RedisStore]) -> None:
    """Redis would answer nobody else while it takes or gives one value of 100 MiB."""
    clock = HandClock()
    one, other = open_store(clock=clock), open_store(clock=clock)
    blob = bytes(range(256)) * (3 * 4096 + 1)  # three parts, and a little
    published = publication(nixl_metadata=blob)
    with redis_server.client() as client:
        client.config_set("proto-max-bulk-len", PART_BYTES + 4096)  # larger values are refused
        first = one.publish(published)
        assert first.worker == published.worker
        [found] = other.find(Query())
        assert (found.worker_is_cut, found.payload_bytes) == (True, len(published.identity) + len(published.worker))
        assert other.whole_worker(found) == published.worker
        [parts] = client.keys("mx:parts:*")
        assert (client.ttl(parts), client.hlen(parts)) == (-1, 4)
        again = other.publish(publication(nixl_metadata=blob[::-1]))
        assert one.whole_worker(found) is None
        assert one.whole_worker(again) == again.worker
        assert len(client.keys("mx:parts:*")) == 1
        other.publish(publication())
        assert client.keys("mx:parts:*") == []
        assert int(client.get("mx:bytes")) < 1000
        one.publish(published)
        clock.advance(HEARTBEAT_SECONDS + COLLECT_SECONDS)
        one.sweep()
        assert sorted(client.keys("*")) == [b"mx:clock", b"mx:epoch", b"mx:replicas"]


def test_parts_that_no_record_names_end_by_themselves(
    redis_server: RedisProcess, open_store: Callable[..., RedisStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A writer that dies amid them leaves nothing for long, and nobody sees half of it."""
    store = open_store()
    before = store.publish(publication(nixl_metadata=bytes(2 * PART_BYTES)))
    put_part = RedisLink.put_part

    def die(self: RedisLink, key: str, number: int, part: bytes, keep_seconds: float) -> None:
        if number == 2:
            raise SystemExit
        put_part(self, key, number, part, keep_seconds)

    monkeypatch.setattr(RedisLink, "put_part", die)
    monkeypatch.setattr(RedisLink, "drop", lambda *_: None)
    with pytest.raises(SystemExit):
        store.publish(publication(nixl_metadata=bytes(4 * PART_BYTES)))
    assert store.find(Query()) == [replace(before, worker=store.find(Query())[0].worker, worker_is_cut=True)]
    assert store.whole_worker(store.find(Query())[0]) == before.worker
    with redis_server.client() as client:
        assert sorted(client.ttl(name) > 0 for name in client.keys("mx:parts:*")) == [False, True]


def test_what_is_refused_writes_no_parts(
    open_store: Callable[..., RedisStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store()
    old = store.publish(publication()).epoch
    store.publish(publication())
    monkeypatch.setattr(RedisLink, "put_part", lambda *_: pytest.fail("a part was written"))
    with pytest.raises(StaleEpoch):
        store.publish(publication(epoch=old, nixl_metadata=bytes(2 * PART_BYTES)))


def test_parts_that_have_ended_meanwhile_are_no_record(
    redis_server: RedisProcess, open_store: Callable[..., RedisStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(large_values, "KEEP_SECONDS", 0.001)
    store = open_store()
    with pytest.raises(StoreUnavailable, match="have ended before it was whole"):
        store.publish(publication(nixl_metadata=bytes(2 * PART_BYTES)))
    assert store.find(Query()) == []


def test_records_that_are_gone_leave_nothing(redis_server: RedisProcess, open_store: Callable[..., RedisStore]) -> None:
    clock = HandClock()
    store = open_store(clock=clock)
    for n in range(1200):  # more than one script looks at
        store.publish(publication(key(f"w{n}", n % 3, f"{n % 7:016x}"), model_name=f"m{n % 7}", status=READY))
    clock.advance(HEARTBEAT_SECONDS + COLLECT_SECONDS)
    assert store.sweep() == (0, 1200)
    store.close()
    with redis_server.client() as client:
        assert sorted(client.keys("*")) == [b"mx:clock", b"mx:epoch"]


def test_search_with_a_limit_looks_at_few_records(
    redis_server: RedisProcess, open_store: Callable[..., RedisStore]
) -> None:
    clock = HandClock()
    store = open_store(clock=clock)
    for n in range(500):
        store.publish(publication(key(f"w{n}"), status=READY))
    with redis_server.client() as client:
        client.config_resetstat()
        assert len(store.find(Query(source_id=key().source_id, status=READY, limit=3))) == 3
        assert client.info("commandstats")["cmdstat_hmget"]["calls"] < 20


def test_what_another_replica_published_is_fetched_once(
    redis_server: RedisProcess, open_store: Callable[..., RedisStore]
) -> None:
    one, two = open_store(), open_store()
    one.publish(publication(status=READY, nixl_metadata=b"x" * 15_000))
    with redis_server.client() as client:

        def sent_bytes() -> int:
            return int(client.info("stats")["total_net_output_bytes"])

        before = sent_bytes()
        for _ in range(20):
            assert len(two.find(Query())[0].worker) > 15_000
        assert sent_bytes() - before < 60_000


# Kills


def test_kills_of_redis_lose_nothing_acknowledged_and_no_live_source(
    redis_server: RedisProcess, open_store: Callable[..., RedisStore]
) -> None:
    """Workers publish, publish again and send heartbeats while Redis is killed at random moments."""
    random_moments = random.Random(7)
    store = open_store()
    acknowledged: dict[str, int] = {}
    refused: list[Exception] = []
    stop = threading.Event()

    def live(worker: str) -> None:
        pause = threading.Event()
        epoch = 0
        while not stop.is_set():
            try:
                epoch = store.publish(publication(key(worker), status=READY, epoch=epoch)).epoch
                acknowledged[worker] = epoch
                store.update_status(key(worker), READY, epoch=epoch)
            except StoreUnavailable:
                pause.wait(0.01)  # as clients do: again, with the epoch that they have
            except StaleEpoch as error:
                refused.append(error)
                return

    threads = [threading.Thread(target=live, args=(f"w{n}",)) for n in range(6)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(20):
            threading.Event().wait(random_moments.uniform(0.02, 0.1))
            redis_server.kill()
            redis_server.start()
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    until(lambda: works(store))
    found = {record.key.worker_id: record for record in store.find(Query(status=READY))}
    assert refused == []
    assert set(found) == {f"w{n}" for n in range(6)}
    assert all(found[worker].epoch >= epoch for worker, epoch in acknowledged.items())


def test_kills_of_the_server_over_redis_lose_nothing(redis_server: RedisProcess, start_server: Start) -> None:
    redis = ("--store", "redis", "--redis-url", redis_server.url)
    random_moments = random.Random(11)
    survivor = start_server(*redis)
    epoch = 0
    acknowledged = []
    for n in range(4):
        victim = start_server(*redis)
        with ServerClient(victim.address, timeout_seconds=5) as client:
            killer = threading.Timer(random_moments.uniform(0.05, 0.2), victim.signal, [signal.SIGKILL])
            killer.start()
            for i in range(10_000):
                try:
                    epoch = client.publish(IDENTITY, WORKER, "again", epoch).epoch
                    acknowledged.append(client.publish(IDENTITY, WORKER, f"{n}-{i}").worker_id)
                except ServerUnreachable:
                    break
        killer.join()
        assert victim.wait() == -signal.SIGKILL
    with ServerClient(survivor.address) as client:
        found = {reference.worker_id for reference in client.list_sources(IDENTITY)}
        assert set(acknowledged) <= found
        client.update_status(SOURCE, "again", 0, READY, epoch=epoch)


def test_two_servers_over_one_redis_and_a_red_readyz(redis_server: RedisProcess, start_server: Start) -> None:
    redis = ("--store", "redis", "--redis-url", redis_server.url)
    one, two = start_server(*redis), start_server(*redis)
    page = one.wait_for(re.compile(r"status page on (http://\S+)"))[1]

    def readyz() -> int:
        try:
            with urllib.request.urlopen(f"{page}/readyz") as answer:  # noqa: S310 - our own page
                return int(answer.status)
        except urllib.error.HTTPError as error:
            with error:
                return error.code

    with ServerClient(one.address) as first, ServerClient(two.address) as second:
        epoch = first.publish(IDENTITY, WORKER, "w").epoch
        second.update_status(SOURCE, "w", 0, READY, epoch=epoch)
        assert [r.worker_id for r in first.list_sources(IDENTITY, status=READY)] == ["w"]
        assert readyz() == 200
        redis_server.kill()
        with pytest.raises(ServerUnreachable, match="UNAVAILABLE: Redis at"):
            second.list_sources(IDENTITY)
        until(lambda: readyz() == 503)
        redis_server.start()
        until(lambda: readyz() == 200)
        until(lambda: second.health().status == "ok")
        assert [r.worker_id for r in second.list_sources(IDENTITY, status=READY)] == ["w"]


def test_redis_that_is_not_there_ends_the_start_with_1_and_one_line(folder: Path) -> None:
    run = mxserver("--port", "0", "--store", "redis", "--redis-url", f"unix://:secret@{folder}/none.sock")
    assert run.returncode == 1
    assert re.fullmatch(r"mxserver: Redis at unix://\S+ cannot be used .* \[MX_STORE_UNUSABLE\]\n", run.stderr)
    assert "secret" not in run.stderr

"""Loads and events with a clock that the test turns."""

from __future__ import annotations

import pytest

from mxserver.store import RecordKey
from mxserver.telemetry import Events, LoadHistory, Loads, Metrics, Refusals
from mxserver.telemetry.events import KEPT_EVENTS, LONGEST_TEXT
from mxserver.telemetry.load_history import KEPT_OF_A_MODEL
from mxserver.telemetry.loads import PROGRESS_A_SECOND, SHOWN_FINISHED
from mxserver.telemetry.refusals import WINDOW_SECONDS
from mxserver.wire.proto import load_pb2, p2p_pb2, record_pb2

KEY = RecordKey("s", "w", 0)
READY = p2p_pb2.SOURCE_STATUS_READY
INITIALIZING = p2p_pb2.SOURCE_STATUS_INITIALIZING
STALE = p2p_pb2.SOURCE_STATUS_STALE


class HandClock:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic_seconds(self) -> float:
        return self.now

    def unix_ms(self) -> int:
        return int(self.now * 1000)


@pytest.fixture
def clock() -> HandClock:
    return HandClock()


@pytest.fixture
def events(clock: HandClock) -> Events:
    return Events(clock)


@pytest.fixture
def loads(clock: HandClock, events: Events) -> Loads:
    return Loads(Metrics(), events, clock, forget_seconds=90)


def progress(loads: Loads, done: int, *, load_id: str = "1", key: RecordKey = KEY, total: int = 1000) -> None:
    said = load_pb2.LoadProgress(load_id=load_id, bytes_done=done, bytes_total=total, path=load_pb2.LOAD_PATH_STORAGE)
    loads.updated(key, p2p_pb2.UpdateStatusRequest(status=INITIALIZING, load_progress=said))


def test_rate_and_time_left(loads: Loads, clock: HandClock) -> None:
    progress(loads, 0)
    assert loads.running()[0].bytes_per_second is None
    clock.now += 2
    progress(loads, 400)
    [load] = loads.running()
    assert load.bytes_per_second == 200
    assert load.eta_seconds == 3
    assert load.path == "storage"


def test_rate_is_that_of_the_last_seconds(loads: Loads, clock: HandClock) -> None:
    progress(loads, 0)
    clock.now += 100
    progress(loads, 100)
    clock.now += 5
    progress(loads, 600)
    assert loads.running()[0].bytes_per_second == 100


def test_bytes_that_were_dropped_make_no_negative_rate(loads: Loads, clock: HandClock) -> None:
    progress(loads, 500)
    clock.now += 1
    progress(loads, 300)
    [load] = loads.running()
    assert load.bytes_per_second == 0
    assert load.eta_seconds is None


def test_another_load_starts_from_nothing(loads: Loads, clock: HandClock) -> None:
    progress(loads, 900)
    clock.now += 1
    progress(loads, 10, load_id="2")
    [load] = loads.running()
    assert (load.bytes_done, load.bytes_per_second, load.running_seconds) == (10, None, 0)


@pytest.mark.parametrize("status", [READY, STALE])
def test_ready_or_goodbye_ends_it(loads: Loads, status: p2p_pb2.SourceStatus.ValueType) -> None:
    progress(loads, 1)
    loads.updated(KEY, p2p_pb2.UpdateStatusRequest(status=status))
    assert loads.running() == []
    assert loads.finished() == []


def test_heartbeat_without_progress_leaves_it(loads: Loads) -> None:
    progress(loads, 1)
    loads.updated(KEY, p2p_pb2.UpdateStatusRequest(status=INITIALIZING))
    assert loads.running_count() == 1


def test_silent_load_is_forgotten(loads: Loads, clock: HandClock) -> None:
    progress(loads, 1)
    clock.now += 60
    assert loads.running()[0].silent_seconds == 60
    clock.now += 31
    assert loads.running_count() == 0


def test_report_ends_the_load_and_is_kept(loads: Loads, events: Events) -> None:
    progress(loads, 1)
    fallback = load_pb2.Fallback(path=load_pb2.LOAD_PATH_PEER_TCP, reason="stalled\nfor 5 s")
    report = load_pb2.LoadReport(load_id="1", bytes=5, seconds=-1, fallbacks=[fallback])
    identity = p2p_pb2.SourceIdentity(model_name="m")
    loads.published(KEY, p2p_pb2.PublishMetadataRequest(identity=identity, load_report=report))
    [done] = loads.finished()
    assert (done.model_name, done.bytes, done.seconds) == ("m", 5, 0)
    assert done.fallbacks == ("peer_tcp: stalled for 5 s",)
    assert loads.running() == []
    assert events.newest()[0].text == "worker w, rank 0 left peer_tcp: stalled for 5 s"


def test_repeated_report_counts_once_and_one_without_id_always(loads: Loads) -> None:
    for load_id in ("1", "1", "", ""):
        report = load_pb2.LoadReport(load_id=load_id)
        loads.published(KEY, p2p_pb2.PublishMetadataRequest(load_report=report))
    assert len(loads.finished()) == 3


def test_late_progress_of_a_load_that_has_ended_is_left_aside(loads: Loads) -> None:
    loads.published(KEY, p2p_pb2.PublishMetadataRequest(load_report=load_pb2.LoadReport(load_id="1")))
    loads.told(KEY, load_pb2.LoadProgress(load_id="1", bytes_done=1))
    assert loads.running() == []
    loads.told(KEY, load_pb2.LoadProgress(load_id="2", bytes_done=1))
    assert loads.running_count() == 1


def test_history_is_bounded(loads: Loads, events: Events) -> None:
    for n in range(200):
        loads.published(KEY, p2p_pb2.PublishMetadataRequest(load_report=load_pb2.LoadReport(load_id=str(n))))
        events.add("call", f"call {n}")
    assert len(loads.finished()) == SHOWN_FINISHED < len(loads.history.of("")) <= KEPT_OF_A_MODEL
    assert len(events.newest()) == KEPT_EVENTS
    assert events.newest()[0].text == "call 199"


def test_givers_have_the_rate_between_two_reports(loads: Loads, clock: HandClock) -> None:
    def given(**by: int) -> None:
        said = [load_pb2.GivenBytes(worker_id=worker, bytes=count) for worker, count in by.items()]
        loads.told(KEY, load_pb2.LoadProgress(load_id="1", given=said))

    given(a=100)
    assert [(one.worker_id, one.bytes_per_second) for one in loads.running()[0].given] == [("a", None)]
    clock.now += 2
    given(a=300, b=50)
    assert loads.running()[0].given == (("a", 300, 100.0), ("b", 50, 25.0))
    clock.now += 1
    given(a=200)
    assert loads.running()[0].given == (("a", 200, 0.0),), "bytes that were dropped make no negative rate"


def test_a_load_is_kept_under_the_names_of_its_worker(loads: Loads) -> None:
    worker = record_pb2.WorkerFacts(pod_name="p", node_name="n", replica="r")
    report = load_pb2.LoadReport(load_id="1")
    loads.updated(KEY, p2p_pb2.UpdateStatusRequest(status=STALE, load_report=report), "m", worker)
    [done] = loads.history.of("M")
    assert (done.pod_name, done.node_name, done.replica) == ("p", "n", "r")


def test_same_event_only_counts(events: Events, clock: HandClock) -> None:
    events.add("store", "disk full")
    clock.now += 5
    events.add("store", "disk full")
    [event] = events.newest()
    assert (event.count, event.at_ms) == (2, 1_005_000)


def test_event_hides_passwords_and_is_one_bounded_line(events: Events) -> None:
    events.add("store", "redis://user:secret@host:6379/0 refused\nthe call " + "x" * 1000)
    [event] = events.newest()
    assert event.text.startswith("redis://host:6379/0 refused the call x")
    assert len(event.text) == LONGEST_TEXT


def test_many_loads_tell_less_often_than_few(loads: Loads, clock: HandClock) -> None:
    def told(count: int) -> float:
        said = load_pb2.LoadProgress(load_id=str(count), bytes_done=count)
        return loads.told(RecordKey("s", f"w{count}", 0), said)

    assert [told(count) for count in range(20)] == [1.0] * 20
    assert [told(count) for count in range(20, 800)][-1] == 800 / PROGRESS_A_SECOND
    clock.now += 91  # those are forgotten
    assert loads.running_count() == 0
    assert told(0) == 1.0


def test_the_rate_of_a_load_that_tells_seldom(loads: Loads, clock: HandClock) -> None:
    progress(loads, 0)
    clock.now += 30
    progress(loads, 300)
    assert loads.running()[0].bytes_per_second == 10


def test_what_was_shared_before_a_restart_counts_as_shared(events: Events, clock: HandClock) -> None:
    metrics, history = Metrics(), LoadHistory()
    loads = Loads(metrics, events, clock, forget_seconds=90, history=history)
    report = load_pb2.LoadReport(load_id="1", path=load_pb2.LOAD_PATH_PEER_TCP)
    published = p2p_pb2.PublishMetadataRequest(identity=p2p_pb2.SourceIdentity(model_name="m"), load_report=report)
    loads.published(KEY, published)
    clock.now += 60
    refusals = Refusals(metrics, events, clock)
    Loads(metrics, events, clock, forget_seconds=90, history=history, refusals=refusals)
    refusals.told(KEY, [load_pb2.Refusal(id="1")], "M")
    assert refusals.not_shared() == []
    clock.now += WINDOW_SECONDS - 30
    refusals.told(KEY, [load_pb2.Refusal(id="2")], "M")
    assert refusals.not_shared() == ["M"]

"""What the server hears of loads, and that no load waits or fails for it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest

from mxcore.transfer.receive import LoadReporter, load_progress
from mxcore.transfer.receive.load_progress import Progress, peer_path
from mxserver.wire import ServerRefused, ServerUnreachable, StaleEpoch
from mxserver.wire.proto import load_pb2
from tests.transfer.conftest import wait_for

STORAGE = load_pb2.LOAD_PATH_STORAGE
PEER_TCP = load_pb2.LOAD_PATH_PEER_TCP
Send = Callable[[load_pb2.LoadProgress], float]


class Line:
    """Takes messages; `failure` is raised instead, where there is one."""

    def __init__(self) -> None:
        self.taken: list[load_pb2.LoadProgress] = []
        self.tries = 0
        self.failure: BaseException | None = None

    def __call__(self, progress: load_pb2.LoadProgress) -> float:
        self.tries += 1
        if self.failure is not None:
            raise self.failure
        self.taken.append(progress)
        return 0.0


@pytest.fixture
def line(monkeypatch: pytest.MonkeyPatch) -> Line:
    for name in ("FIRST_SECONDS", "INTERVAL_SECONDS", "LONGEST_INTERVAL_SECONDS"):
        monkeypatch.setattr(load_progress, name, 0.01)
    return Line()


@pytest.fixture
def reporter(line: Line) -> Iterator[LoadReporter]:
    made = LoadReporter(line)
    yield made
    made.close()


def test_progress_is_told_while_it_runs_and_the_report_is_kept_until_taken(line: Line, reporter: LoadReporter) -> None:
    assert reporter.report() is None
    with reporter.loading(STORAGE) as step:
        step(10, 100)
        wait_for(lambda: line.taken and line.taken[-1].bytes_done == 10)
        step(60, 100)
        wait_for(lambda: line.taken[-1].bytes_done == 60)
        assert reporter.report() is None
        step(100, 100)
    said = line.taken[-1]
    assert (said.path, said.bytes_total, said.from_worker_id, said.holders) == (STORAGE, 100, "", 0)
    report = reporter.report()
    assert report is not None
    assert (report.load_id, report.path, report.bytes) == (said.load_id, STORAGE, 100)
    assert report.seconds > 0
    reporter.reported(load_pb2.LoadReport())  # another one
    assert reporter.report() is report
    reporter.reported(report)
    assert reporter.report() is None


def test_a_way_that_was_left_is_a_fallback_of_the_same_load(line: Line, reporter: LoadReporter) -> None:
    def fail() -> None:
        with reporter.loading(PEER_TCP) as step:
            step(5, 100)
            wait_for(lambda: line.taken)
            raise ServerRefused("no more")

    with pytest.raises(ServerRefused, match="no more"):
        fail()
    assert reporter.report() is None
    with reporter.loading(STORAGE) as step:
        step.ended(STORAGE, 100, 2.5, chunks_verified=7)
    report = reporter.report()
    assert report is not None
    assert (report.bytes, report.seconds, report.chunks_verified) == (100, 2.5, 7)
    assert [(f.path, f.reason) for f in report.fallbacks] == [(PEER_TCP, "ServerRefused: no more [MX_SERVER_REFUSED]")]
    assert report.load_id == line.taken[0].load_id
    reporter.reported(report)
    with reporter.loading(STORAGE):
        pass
    following = reporter.report()
    assert following is not None
    assert following.load_id != report.load_id
    assert not following.fallbacks


def test_holders_are_asked_for_at_each_message(line: Line, reporter: LoadReporter) -> None:
    counts = iter(range(1, 1_000_000))
    with reporter.loading(load_pb2.LOAD_PATH_UNSPECIFIED) as step:
        step.progress = lambda: Progress(PEER_TCP, next(counts), 100, "w7", 3)
        wait_for(lambda: len(line.taken) > 3)
    last = line.taken[-1]
    assert (last.path, last.from_worker_id, last.holders) == (PEER_TCP, "w7", 3)
    assert [p.bytes_done for p in line.taken] == sorted(p.bytes_done for p in line.taken)


@pytest.mark.parametrize(
    "failure", [ServerUnreachable("away"), ServerRefused("unknown"), StaleEpoch("newer"), RuntimeError("a fault")]
)
def test_failures_cost_no_load_anything(line: Line, reporter: LoadReporter, failure: BaseException) -> None:
    line.failure = failure
    with reporter.loading(STORAGE) as step:
        step(1, 2)
        wait_for(lambda: line.tries > 1)
        line.failure = None
        wait_for(lambda: line.taken)
    assert reporter.report() is not None


def test_a_standing_that_fails_fails_no_load(line: Line, reporter: LoadReporter) -> None:
    def broken() -> Progress:
        raise KeyError("gone")

    with reporter.loading(STORAGE) as step:
        step.progress = broken
    report = reporter.report()
    assert report is not None
    assert report.bytes == 0


def test_nobody_waits_for_a_server_that_hangs(line: Line) -> None:
    asked, answer = threading.Event(), threading.Event()

    def hang(progress: load_pb2.LoadProgress) -> float:
        asked.set()
        answer.wait()
        return 0.0

    reporter = LoadReporter(hang)
    with reporter.loading(STORAGE) as step:
        assert asked.wait(60)
        step(2, 2)
    assert reporter.report() is not None  # while the call still hangs
    assert not answer.is_set()
    answer.set()
    reporter.close()


def test_the_server_says_when_it_wants_to_hear_again() -> None:
    reporter = LoadReporter(lambda progress: 17.5)
    with reporter.loading(STORAGE) as step:
        assert reporter._tell(step, "1", 1.0) == 17.5
    reporter.close()
    forever = LoadReporter(lambda progress: 1e9)
    with forever.loading(STORAGE) as step:
        assert forever._tell(step, "1", 1.0) == load_progress.LONGEST_INTERVAL_SECONDS
    forever.close()


def test_calls_that_take_long_become_rare() -> None:
    reporter = LoadReporter(lambda progress: float(threading.Event().wait(0.1)))
    with reporter.loading(STORAGE) as step:
        assert reporter._tell(step, "1", 1.0) >= 0.1 / load_progress.CALL_SHARE
    reporter.close()
    quick = LoadReporter(Line())
    with quick.loading(STORAGE) as step:
        assert quick._tell(step, "1", 1.0) >= load_progress.INTERVAL_SECONDS
    quick.close()


def test_another_membership_tells_the_report(line: Line, reporter: LoadReporter) -> None:
    first = LoadReporter(line)
    with first.loading(STORAGE) as step:
        step(3, 3)
    reporter.take_over(first)
    assert first.report() is None
    report = reporter.report()
    assert report is not None
    assert report.bytes == 3
    first.close()


def test_nothing_is_told_after_the_end(line: Line, reporter: LoadReporter) -> None:
    reporter.close()
    reporter.close()
    with reporter.loading(STORAGE) as step:
        step(1, 1)
    assert line.tries == 0


def test_paths_of_peers() -> None:
    assert peer_path("same-host") == load_pb2.LOAD_PATH_PEER_SAME_HOST
    assert peer_path("tcp") == PEER_TCP
    assert peer_path("rdma") == load_pb2.LOAD_PATH_PEER_RDMA
    assert peer_path("pigeon") == load_pb2.LOAD_PATH_UNSPECIFIED


def test_who_gave_is_told_those_that_gave_most_first_and_not_all_of_them(line: Line, reporter: LoadReporter) -> None:
    given = {f"w{n:02}": 100 + n for n in range(40)}
    with reporter.loading(PEER_TCP) as step:
        step.progress = lambda: Progress(PEER_TCP, 1, 100, "w39", 3, given)
        wait_for(lambda: line.taken)
        step.ended(PEER_TCP, 5000, 2.0, "w39", 7, given)
    assert [one.worker_id for one in line.taken[-1].given] == [f"w{n}" for n in range(39, 31, -1)]
    report = reporter.report()
    assert report is not None
    assert [(one.worker_id, one.bytes) for one in report.given[:2]] == [("w39", 139), ("w38", 138)]
    assert (len(report.given), report.givers, report.bytes_from_workers) == (16, 40, sum(given.values()))


def test_the_report_parts_the_whole_time(reporter: LoadReporter) -> None:
    with reporter.loading(STORAGE) as step:
        step.ended(STORAGE, 100, 0.0)
    report = reporter.report()
    assert report is not None
    assert (report.transfer_seconds, report.bytes_from_workers) == (0.0, 0)
    assert report.wait_seconds > 0, "from the reporter's own beginning"
    processed = report.process_seconds
    assert processed > 0, "until somebody asked for it"
    again = reporter.report()
    assert again is report
    assert again.process_seconds == processed


def test_an_engine_says_what_of_it_was_processing(reporter: LoadReporter) -> None:
    reporter.took(1.0, 2.0)  # there is nothing that it could be of
    with reporter.loading(STORAGE) as step:
        step.ended(STORAGE, 100, 5.0)
    reporter.took(3600.0, 7200.0)
    report = reporter.report()
    assert report is not None
    assert (report.transfer_seconds, report.process_seconds, report.wait_seconds) == (3600.0, 7200.0, 0.0)
    reporter.took(0.0, 0.0)
    assert report.wait_seconds > 0
    other = LoadReporter(lambda progress: None)
    other.take_over(reporter)
    taken = other.report()
    assert taken is report
    assert taken.process_seconds == 0.0, "it stays as the engine said"
    other.close()


def test_the_next_load_begins_when_it_begins(reporter: LoadReporter) -> None:
    with reporter.loading(STORAGE):
        pass
    first = reporter.report()
    assert first is not None
    reporter.reported(first)
    with reporter.loading(STORAGE):
        pass
    following = reporter.report()
    assert following is not None
    assert following.wait_seconds == pytest.approx(0.0, abs=1e-3)

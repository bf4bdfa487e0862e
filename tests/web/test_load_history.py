"""The last loads of each model: how many are kept, what a restart finds, and what a bad file or a stuck disk costs."""

from __future__ import annotations

import logging
import sqlite3
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mxserver.telemetry import LoadHistory, load_history
from mxserver.telemetry.load_history import LONGEST_NAME, LONGEST_SECONDS, MAX_FALLBACKS, MAX_GIVERS
from mxserver.wire.proto import load_pb2
from tests.web.conftest import wait_for

PEER_TCP = load_pb2.LOAD_PATH_PEER_TCP
Open = Callable[[], LoadHistory]


def load(number: int, model: str = "org/M", **report: object) -> load_pb2.KeptLoad:
    values = {"load_id": str(number), "path": PEER_TCP, "bytes": 100, "seconds": 2.0, **report}
    return load_pb2.KeptLoad(
        mx_source_id="s",
        worker_id=f"w{number}",
        model_name=model,
        at_unix_ms=number,
        pod_name=f"pod-{number}",
        node_name="n1",
        replica=f"r{number}",
        report=load_pb2.LoadReport(**values),  # type: ignore[arg-type]
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "loads.sqlite3"


@pytest.fixture
def opened(path: Path) -> Iterator[Open]:
    histories: list[LoadHistory] = []

    def start() -> LoadHistory:
        for history in histories:
            history.close()
        histories.append(LoadHistory(path))
        return histories[-1]

    yield start
    for history in histories:
        history.close()


def rows(path: Path) -> list[int]:
    """The numbers in a file that nobody has open."""
    connection = sqlite3.connect(path)
    try:
        return [number for (number,) in connection.execute("SELECT id FROM load ORDER BY id")]
    finally:
        connection.close()


def test_a_restart_finds_the_last_loads(opened: Open) -> None:
    given = [load_pb2.GivenBytes(worker_id="w0", bytes=60)]
    history = opened()
    history.add(load(1))
    added = history.add(load(2, wait_seconds=1.0, transfer_seconds=2.0, process_seconds=3.0, given=given, givers=1))
    again = opened()
    assert [one.key.worker_id for one in again.of("ORG/m")] == ["w2", "w1"]
    assert again.of("org/M")[0] == added
    assert (added.ready_seconds, added.given, added.bytes_from_workers) == (6.0, (("w0", 60),), 100)
    assert (added.pod_name, added.node_name, added.replica) == ("pod-2", "n1", "r2")
    again.add(load(3))
    assert [one.key.worker_id for one in opened().newest(2)] == ["w3", "w2"]


def test_memory_and_file_are_bounded_by_count_model_and_bytes(
    opened: Open, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load_history, "KEPT_OF_A_MODEL", 4)
    monkeypatch.setattr(load_history, "KEPT_LOADS", 6)
    history = opened()
    history.add(load(0, "quiet"))
    for number in range(1, 8):
        history.add(load(number))
    assert [one.at_ms for one in history.of("org/M")] == [7, 6, 5, 4]
    for number in range(8, 12):
        history.add(load(number, "other"))
    assert len(history.of("quiet")) == 1, "the one with most loads loses them"
    assert sum(len(history.of(model)) for model in history.models()) == 6
    kept = sorted(one.at_ms for model in history.models() for one in history.of(model))
    history.close()
    assert [number - 1 for number in rows(path)] == kept, "the file has what the memory has"
    monkeypatch.setattr(load_history, "KEPT_LOADS", 3)
    smaller = opened()
    assert sum(len(smaller.of(model)) for model in smaller.models()) == 3
    smaller.close()
    assert len(rows(path)) == 3
    monkeypatch.setattr(load_history, "KEPT_BYTES", 1)
    assert opened().models() == {}


def test_what_clients_send_is_cut_to_its_limits() -> None:
    history = LoadHistory()
    fallback = load_pb2.Fallback(path=PEER_TCP, reason="x" * 1000)
    given = [load_pb2.GivenBytes(worker_id="y" * 1000, bytes=1)] * 50
    added = history.add(
        load(1, "z" * 1000, fallbacks=[fallback] * 50, given=given, wait_seconds=float("inf"), process_seconds=1e300)
    )
    assert len(added.model_name) == LONGEST_NAME
    assert (len(added.fallbacks), len(added.given), added.givers) == (MAX_FALLBACKS, MAX_GIVERS, 50)
    assert len(added.given[0][0]) == LONGEST_NAME
    assert (added.wait_seconds, added.process_seconds) == (0.0, LONGEST_SECONDS)


def test_bytes_of_workers_are_those_of_the_path_unless_told() -> None:
    history = LoadHistory()
    assert history.add(load(1)).bytes_from_workers == 100
    assert history.add(load(2, path=load_pb2.LOAD_PATH_STORAGE)).bytes_from_workers == 0
    assert history.add(load(3, bytes_from_workers=70)).bytes_from_workers == 70
    assert history.add(load(4, bytes_from_workers=700)).bytes_from_workers == 100, "no more than there were"


@pytest.mark.parametrize("content", [b"no database at all" * 100, b""])
def test_a_file_that_cannot_be_used_costs_no_load(content: bytes, path: Path, caplog: pytest.LogCaptureFixture) -> None:
    if content:
        path.write_bytes(content)
    else:  # another program's
        connection = sqlite3.connect(path)
        connection.executescript("CREATE TABLE other (x)")
        connection.close()
    before = path.read_bytes()
    history = LoadHistory(path)
    history.add(load(1))
    history.close()
    assert len(history.of("org/M")) == 1
    assert "kept in memory alone" in caplog.text
    assert path.read_bytes() == before


def test_nobody_waits_for_a_disk_that_is_stuck(
    opened: Open, path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The writer hangs, the queue fills up, and each load is kept in memory at once; it goes on when the disk does."""
    monkeypatch.setattr(load_history, "_WAITING_CHANGES", 4)
    monkeypatch.setattr(load_history, "_CLOSE_SECONDS", 60.0)
    reached, go_on = threading.Event(), threading.Event()
    taken = load_history._LoadFile._taken

    def stuck(file: load_history._LoadFile) -> object:
        changes = taken(file)
        reached.set()
        assert go_on.wait(60)
        return changes

    monkeypatch.setattr(load_history._LoadFile, "_taken", stuck)
    history = opened()
    history.add(load(1))
    assert reached.wait(60)
    with caplog.at_level(logging.WARNING):
        for number in range(2, 20):
            history.add(load(number))
    assert len(history.of("org/M")) == 19
    assert "the disk is too slow for it" in caplog.text
    go_on.set()
    history.close()
    assert rows(path) == [1, 2, 3, 4, 5]


def test_a_write_that_fails_is_told_and_the_next_one_is_tried(
    opened: Open, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    history = opened()
    file = history._file
    assert file is not None
    file.put([(7, object())])  # type: ignore[list-item] # SQLite takes no such value
    wait_for(lambda: "does not get the last loads" in caplog.text)
    history.add(load(1))
    history.close()
    assert rows(path) == [1]

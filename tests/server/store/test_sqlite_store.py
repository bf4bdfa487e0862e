"""The SQLite store's file: what it refuses, what it survives, and what it does not write."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from mxserver.store import Query, SqliteStore, StoreEnded, StoreUnavailable
from mxserver.store.batch import Batch
from mxserver.store.errors import StoreTooNew, StoreUnusable
from mxserver.store.sqlite_file import SCHEMA_VERSION
from mxserver.wire import StaleEpoch
from tests.server.stores import LEASES, READY, STALE, HandClock, key, publication


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "folder" / "state.sqlite3"


@pytest.fixture
def store(path: Path) -> Iterator[SqliteStore]:
    opened = SqliteStore(path, LEASES, HandClock())
    yield opened
    opened.close()


def wal_bytes(path: Path) -> int:
    return path.with_name(path.name + "-wal").stat().st_size


def execute(path: Path, *statements: str) -> list[tuple[object, ...]]:
    connection = sqlite3.connect(path, isolation_level=None)
    try:
        return [row for statement in statements for row in connection.execute(statement)]
    finally:
        connection.close()


# At start


def test_new_file_is_made_with_its_folder_in_wal_mode(store: SqliteStore, path: Path) -> None:
    store.close()
    assert execute(path, "PRAGMA journal_mode", "PRAGMA user_version") == [("wal",), (SCHEMA_VERSION,)]


def test_empty_file_is_taken(path: Path) -> None:
    path.parent.mkdir()
    path.touch()
    store = SqliteStore(path)
    store.publish(publication())
    store.close()


def test_newer_schema_is_refused_and_left_alone(store: SqliteStore, path: Path) -> None:
    store.publish(publication())
    store.close()
    execute(path, f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    with pytest.raises(StoreTooNew, match=f"schema {SCHEMA_VERSION + 1}.*newer mxserver.*up to {SCHEMA_VERSION}"):
        SqliteStore(path)
    assert execute(path, "SELECT count(*) FROM source") == [(1,)]


def test_file_of_the_first_schema_is_taken_over(store: SqliteStore, path: Path) -> None:
    epoch = store.publish(publication(status=READY)).epoch
    store.close()
    execute(
        path,
        "ALTER TABLE source DROP COLUMN life",
        "ALTER TABLE source DROP COLUMN owner",
        "PRAGMA user_version = 1",
    )
    store = SqliteStore(path, LEASES, HandClock())
    [record] = store.find(Query())
    assert (record.epoch, record.life, record.owner) == (epoch, epoch, "")
    store.close()
    assert execute(path, "PRAGMA user_version") == [(SCHEMA_VERSION,)]


def test_database_of_another_program_is_refused_and_left_alone(path: Path) -> None:
    path.parent.mkdir()
    execute(path, "CREATE TABLE theirs (x)")
    with pytest.raises(StoreUnusable, match="another program"):
        SqliteStore(path)
    assert execute(path, "SELECT name FROM sqlite_schema") == [("theirs",)]


def test_file_that_is_no_database_is_refused_and_left_alone(path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(b"not a database" * 1000)
    with pytest.raises(StoreUnusable, match=r"is damaged .*move it away"):
        SqliteStore(path)
    assert path.read_bytes() == b"not a database" * 1000


def test_damaged_pages_are_found_at_start(store: SqliteStore, path: Path) -> None:
    for n in range(50):
        store.publish(publication(key(f"w{n}"), nixl_metadata=os.urandom(3000)))
    store.close()
    with path.open("r+b") as file:
        file.seek(2 * 4096)
        file.write(b"\xff" * 4096 * 20)
    with pytest.raises(StoreUnusable, match="is damaged"):
        SqliteStore(path)


def test_record_that_is_no_message_is_found_at_start(store: SqliteStore, path: Path) -> None:
    store.publish(publication())
    store.close()
    execute(path, "UPDATE payload SET worker = x'ffffff'")
    with pytest.raises(StoreUnusable, match="is damaged"):
        SqliteStore(path)


def test_path_in_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreUnusable, match="cannot be opened for writing"):
        SqliteStore(tmp_path / "file" / "state.sqlite3")


def test_folder_as_path_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreUnusable, match="cannot be opened for writing"):
        SqliteStore(tmp_path)


OPEN_WITHOUT_PRIVILEGES = """
import os, sys
from pathlib import Path
from mxserver.store.errors import StoreUnusable
from mxserver.store.sqlite import SqliteStore

if os.getuid() == 0:  # root may write everywhere
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
try:
    SqliteStore(Path(sys.argv[1]))
except StoreUnusable as error:
    print(error)
"""


def test_file_that_may_not_be_written_is_refused() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = folder / "state.sqlite3"
        SqliteStore(path).close()
        path.chmod(0o444)
        folder.chmod(0o555)
        command = [sys.executable, "-c", OPEN_WITHOUT_PRIVILEGES, path]
        run = subprocess.run(command, capture_output=True, text=True, check=True)
        folder.chmod(0o755)
    assert "cannot be opened for writing (Permission denied)" in run.stdout


def test_second_process_on_the_same_file_is_refused(store: SqliteStore, path: Path) -> None:
    store.publish(publication())
    with pytest.raises(StoreUnusable, match="in use by another process"):
        SqliteStore(path)
    store.publish(publication())


# While running


def test_heartbeats_write_nothing(store: SqliteStore, path: Path) -> None:
    for n in range(5):
        store.publish(publication(key(f"w{n}"), status=READY))
    before = wal_bytes(path), path.stat().st_mtime_ns
    for _ in range(100):
        for n in range(5):
            store.update_status(key(f"w{n}"), READY, source_load=0.5)
        store.sweep()
        store.check()
    assert (wal_bytes(path), path.stat().st_mtime_ns) == before


def test_status_change_does_not_rewrite_the_metadata(store: SqliteStore, path: Path) -> None:
    store.publish(publication(nixl_metadata=b"x" * 4_000_000))
    before = wal_bytes(path)
    store.update_status(key(), READY)
    assert wal_bytes(path) - before < 100_000


def test_changes_that_wait_together_share_a_commit(store: SqliteStore) -> None:
    """While the writer is held up by one change, others queue; then one commit keeps them all."""
    held, go_on = threading.Event(), threading.Event()
    batches: list[int] = []

    def hold(batch: Batch) -> None:
        held.set()
        assert go_on.wait(120)

    def note(batch: Batch) -> None:
        batches.append(id(batch))
        batch.publish(publication(key(f"w{len(batches)}")))

    threads = [threading.Thread(target=store._change, args=(hold,))]
    threads[0].start()
    assert held.wait(120)
    for _ in range(20):
        threads.append(threading.Thread(target=store._change, args=(note,)))
        threads[-1].start()
    while store._changes.qsize() < 20:
        threads[-1].join(0.01)
    go_on.set()
    for thread in threads:
        thread.join()
    assert len(batches) == 20
    assert len(set(batches)) == 1
    assert len(store.find(Query())) == 20


def test_one_refused_change_does_not_spoil_the_others_of_its_commit(store: SqliteStore) -> None:
    old = store.publish(publication()).epoch
    store.publish(publication())
    outcomes: list[object] = []
    start = threading.Barrier(10)

    def publish(n: int) -> None:
        start.wait()
        try:
            outcomes.append(store.publish(publication(key("w0" if n % 2 else f"w{n}"), epoch=old if n % 2 else 0)))
        except StaleEpoch as error:
            outcomes.append(error)

    threads = [threading.Thread(target=publish, args=(n,)) for n in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(isinstance(outcome, StaleEpoch) for outcome in outcomes) == 5
    assert {record.key.worker_id for record in store.find(Query())} >= {"w2", "w4", "w6", "w8"}


def test_file_that_was_removed_makes_changes_fail_and_reading_go_on(store: SqliteStore, path: Path) -> None:
    record = store.publish(publication())
    path.unlink()
    with pytest.raises(StoreUnavailable, match="is gone"):
        store.check()
    with pytest.raises(StoreUnavailable, match="is gone"):
        store.publish(publication(key("other")))
    with pytest.raises(StoreUnavailable, match="is gone"):
        store.update_status(key(), READY)
    assert store.find(Query()) == [record]  # nothing of the failed changes shows


def test_file_that_was_replaced_makes_changes_fail(store: SqliteStore, path: Path) -> None:
    path.rename(path.with_name("moved"))
    path.touch()
    with pytest.raises(StoreUnavailable, match="replaced"):
        store.publish(publication())


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from mxserver.store.errors import StoreUnavailable
from mxserver.store.interface import Query
from mxserver.store.sqlite import SqliteStore
from tests.server.stores import publication, key

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
path = Path(sys.argv[1])
store = SqliteStore(path)
first = store.publish(publication(key("a")))
wal = path.with_name(path.name + "-wal").stat().st_size
resource.setrlimit(resource.RLIMIT_FSIZE, (wal + 8192, resource.RLIM_INFINITY))
for attempt in range(2):
    try:
        store.publish(publication(key("big"), nixl_metadata=b"x" * 1_000_000))
    except StoreUnavailable as error:
        print("refused:", error)
assert store.find(Query()) == [first]
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
store.check()
second = store.publish(publication(key("big"), nixl_metadata=b"x" * 1_000_000))
assert second.epoch > first.epoch
store.close()
again = SqliteStore(path)
assert {r.key.worker_id for r in again.find(Query())} == {"a", "big"}
again.close()
print("recovered")
"""


def test_full_disk_makes_changes_fail_until_there_is_room(path: Path) -> None:
    """A limit on file sizes stands for the full disk: SQLite sees a write that fails."""
    run = subprocess.run([sys.executable, "-c", FULL_DISK, path], capture_output=True, text=True, check=True)
    lines = run.stdout.splitlines()
    assert lines[-1] == "recovered"
    assert sum(line.startswith("refused: writing to") for line in lines) == 2


PUBLISH_UNTIL_KILLED = """
import sys
from pathlib import Path
from mxserver.store.sqlite import SqliteStore
from tests.server.stores import READY, publication, key

store = SqliteStore(Path(sys.argv[1]))
n = 0
while True:
    epoch = store.publish(publication(key(f"w{n}"))).epoch
    store.update_status(key(f"w{n}"), READY)
    print(n, epoch, flush=True)
    n += 1
"""


def test_killed_process_loses_nothing_that_it_answered(path: Path) -> None:
    last_epoch = 0
    for _ in range(3):
        with subprocess.Popen(
            [sys.executable, "-c", PUBLISH_UNTIL_KILLED, path], stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            lines = [process.stdout.readline() for _ in range(30)]
            process.send_signal(signal.SIGKILL)
            lines += process.stdout.readlines()
        answered = [tuple(map(int, line.split())) for line in lines if line.endswith("\n")]
        store = SqliteStore(path)
        found = {record.key.worker_id: record for record in store.find(Query())}
        store.close()
        assert all(found[f"w{n}"].status == READY and found[f"w{n}"].epoch >= epoch for n, epoch in answered)
        assert min(epoch for _, epoch in answered) > last_epoch
        last_epoch = max(record.epoch for record in found.values())


def test_goodbye_is_kept(store: SqliteStore, path: Path) -> None:
    store.publish(publication(status=READY))
    store.update_status(key(), STALE)
    store.close()
    assert execute(path, "SELECT status FROM source") == [(STALE,)]


def test_an_unexpected_error_of_a_commit_fails_those_who_wait_and_the_writer_goes_on(store: SqliteStore) -> None:
    """A rank that fits no column stands for any value that SQLite cannot keep."""
    with pytest.raises(StoreUnavailable, match=r"writing to .* failed"):
        store.publish(replace(publication(), key=key(rank=2**63)))
    store.check()
    assert store.publish(publication()).epoch > 0
    assert [record.key for record in store.find(Query())] == [key()]


def test_what_waited_too_long_is_not_kept(store: SqliteStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """The finding H12: callers were told that nothing was kept, and found it kept later."""
    monkeypatch.setattr("mxserver.store.sqlite.ANSWER_SECONDS", 0.2)
    held, go_on = threading.Event(), threading.Event()

    def hold(_: object) -> None:
        held.set()
        assert go_on.wait(60)

    def hold_and_fail() -> None:
        with pytest.raises(StoreUnavailable, match="whether it is kept will show"):
            store._change(hold)

    holder = threading.Thread(target=hold_and_fail)
    holder.start()
    assert held.wait(60)
    with pytest.raises(StoreUnavailable, match="nothing of it is kept"):
        store.publish(publication(key(worker="late")))
    with pytest.raises(StoreUnavailable, match="has not answered"):
        store.check()
    go_on.set()
    holder.join()
    store.publish(publication(key(worker="early")))
    assert [record.key.worker_id for record in store.find(Query())] == ["early"]
    store.check()


def test_an_error_that_nobody_expected_ends_the_writer_and_fails_those_who_wait(
    store: SqliteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """File and memory may differ then, so that only a restart helps."""
    store.publish(publication())
    held, go_on = threading.Event(), threading.Event()

    def fail(_: object) -> None:
        held.set()
        assert go_on.wait(60)
        raise RuntimeError("broken")

    failures: list[Exception] = []

    def publish(number: int) -> None:
        try:
            store.publish(publication(key(worker=f"w{number}")))
        except StoreUnavailable as error:
            failures.append(error)

    monkeypatch.setattr(store._index, "apply", fail)
    threads = [threading.Thread(target=publish, args=(number,)) for number in range(5)]
    threads[0].start()
    assert held.wait(60)
    for thread in threads[1:]:
        thread.start()
    while store._changes.qsize() < 4:
        threads[0].join(0.01)
    go_on.set()
    for thread in threads:
        thread.join(60)
    assert len(failures) == 5
    store._writer.join(60)
    for call in (store.check, store.sweep, lambda: store.publish(publication())):
        with pytest.raises(StoreEnded):
            call()


def test_a_check_passes_through_the_queue_and_does_not_write(store: SqliteStore, path: Path) -> None:
    store.publish(publication())
    before = store._file._connection.total_changes
    store.check()
    assert store._check is not None
    assert store._check.done()
    assert store._file._connection.total_changes == before


def test_a_slow_disk_is_no_failure(store: SqliteStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not before it was silent for as long as callers wait (`test_what_waited_too_long_is_not_kept`)."""
    monkeypatch.setattr("mxserver.store.sqlite.CHECK_SECONDS", 0.05)
    held, go_on = threading.Event(), threading.Event()

    def hold(_: object) -> None:
        held.set()
        assert go_on.wait(60)

    holder = threading.Thread(target=store._change, args=(hold,))
    holder.start()
    assert held.wait(60)
    store.check()
    store.check()
    go_on.set()
    holder.join()

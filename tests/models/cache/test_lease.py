"""Leases and use marks: between replicas of one kernel, and between machines (another kernel id)."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mxserver.models.cache import Lease
from mxserver.models.cache import lease as lease_module
from mxserver.models.cache.lease import LeaseFolder
from mxserver.models.errors import LeaseLost
from tests.small_disk import SmallDisk

KEY = "0" * 32


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., LeaseFolder]]:
    made: list[LeaseFolder] = []

    def build(seconds: float = 60.0, *, kernel: str | None = None) -> LeaseFolder:
        made.append(LeaseFolder(tmp_path, seconds, kernel=kernel))
        return made[-1]

    yield build
    for folder in made:
        folder.close()


def until(condition: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("kernels", [(None, None), ("here", "there")])
def test_one_at_a_time(make: Callable[..., LeaseFolder], kernels: tuple[str | None, str | None]) -> None:
    ours, theirs = (make(kernel=kernel) for kernel in kernels)
    lease = ours.try_acquire(KEY)
    assert lease
    assert theirs.try_acquire(KEY) is None
    assert ours.try_acquire(KEY) is None
    assert theirs.is_leased(KEY)
    assert theirs.try_acquire("1" * 32)
    ours.release(lease)
    assert not theirs.is_leased(KEY)
    following = theirs.try_acquire(KEY)
    assert following
    assert following.generation == lease.generation + 1
    assert following.token != lease.token


def test_number_whose_file_was_deleted_meanwhile_is_no_lease(
    make: Callable[..., LeaseFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the look of one at the newest number and its link, others took two numbers and deleted the older one."""
    slow, fast, last = make(), make(), make()
    first = slow.try_acquire(KEY)
    assert first
    slow.release(first)
    held: list[Lease] = []
    make_file = lease_module._LiveFile.__init__

    def make_late(self: lease_module._LiveFile, folder: Path, name: str, kernel: str) -> None:
        monkeypatch.undo()
        between = fast.try_acquire(KEY)
        assert between
        fast.release(between)
        newest = last.try_acquire(KEY)
        assert newest
        held.append(newest)
        make_file(self, folder, name, kernel)

    monkeypatch.setattr(lease_module._LiveFile, "__init__", make_late)
    assert slow.try_acquire(KEY) is None
    held[0].check()


def test_exactly_one_of_many_wins(make: Callable[..., LeaseFolder]) -> None:
    folders = [make() for _ in range(8)]
    for _ in range(10):
        won = []
        start = threading.Barrier(len(folders))

        def race(folder: LeaseFolder, start: threading.Barrier = start, won: list[object] = won) -> None:
            start.wait()
            if lease := folder.try_acquire(KEY):
                won.append((folder, lease))

        threads = [threading.Thread(target=race, args=(folder,)) for folder in folders]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == 1
        folder, lease = won[0]  # type: ignore[misc]
        folder.release(lease)


def test_holder_on_another_machine_that_went_silent_is_followed(
    make: Callable[..., LeaseFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    silent = make(0.5, kernel="there")
    monkeypatch.setattr(silent, "_held", set())
    lease = silent.try_acquire(KEY)
    assert lease
    monkeypatch.setattr(silent, "_held", set())  # nobody touches its file any more
    ours = make(0.5)
    assert ours.try_acquire(KEY) is None
    until(lambda: ours.try_acquire(KEY) is not None)
    with pytest.raises(LeaseLost):
        lease.check()


def test_living_holder_keeps_its_lease_past_the_time(make: Callable[..., LeaseFolder], tmp_path: Path) -> None:
    theirs, ours = make(0.3, kernel="there"), make(0.3)
    lease = theirs.try_acquire(KEY)
    assert lease
    path = tmp_path / "leases" / lease.token
    begun = path.stat().st_mtime
    until(lambda: path.stat().st_mtime > begun + 1)
    assert ours.try_acquire(KEY) is None
    lease.check()


HOLDER = """
import sys
from pathlib import Path
from mxserver.models.cache import Lease
from mxserver.models.cache import lease as lease_module
from mxserver.models.cache.lease import LeaseFolder
folder = LeaseFolder(Path(sys.argv[1]), 600)
lease = folder.try_acquire(sys.argv[2])
with folder.in_use(sys.argv[2]):
    print(lease.generation, flush=True)
    sys.stdin.read()
"""


def test_killed_process_is_followed_at_once(make: Callable[..., LeaseFolder], tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path), KEY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout
    assert process.stdin
    assert process.stdout.readline() == "1\n"
    ours = make(600)
    assert ours.try_acquire(KEY) is None
    assert ours.is_used(KEY)
    process.kill()
    process.wait()
    process.stdin.close()
    process.stdout.close()
    lease = ours.try_acquire(KEY)
    assert lease
    assert lease.generation == 2
    assert not ours.is_used(KEY)


def test_use_marks(make: Callable[..., LeaseFolder], tmp_path: Path) -> None:
    ours, theirs = make(), make(kernel="there")
    with ours.in_use(KEY), ours.in_use(KEY):
        with ours.in_use(KEY):
            assert theirs.is_used(KEY)
        assert theirs.is_used(KEY)
        assert not theirs.is_used("1" * 32)
    assert not theirs.is_used(KEY)
    assert not [name for name in os.listdir(tmp_path / "uses") if not name.startswith(".clock")]  # noqa: PTH208


def test_waiting_ends_when_the_server_stops(make: Callable[..., LeaseFolder]) -> None:
    folder, stopping = make(), threading.Event()
    assert folder.try_acquire(KEY)
    stopping.set()
    with pytest.raises(LeaseLost, match="is stopping"), folder.acquired(KEY, stopping):
        pass


def test_close_lets_go(make: Callable[..., LeaseFolder]) -> None:
    ours, theirs = make(), make()
    assert ours.try_acquire(KEY)
    ours.close()
    ours.close()
    assert theirs.try_acquire(KEY)


def test_a_full_disk_has_leases_and_marks_all_the_same(small_disk: SmallDisk) -> None:
    one, other = (LeaseFolder(small_disk.folder, 60) for _ in range(2))
    try:
        small_disk.fill(0)
        lease = one.try_acquire("k")
        assert lease is not None
        assert other.try_acquire("k") is None
        one.release(lease)
        again = other.try_acquire("k")
        assert again is not None
        assert again.generation == 2
        with one.in_use("m"):
            assert other.is_used("m")
        assert not other.is_used("m")
        assert small_disk.free_bytes == 0
    finally:
        one.close()
        other.close()


NOBODY = 20_002  # a user id; needs root to become it


def as_another_user(function: Callable[[], None]) -> int:
    """Calls it in a process of another user; 0 when it raised nothing."""
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            function()
        except BaseException:  # noqa: BLE001 - the exit status tells
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


DIES = f"""
import os, sys
from pathlib import Path
from mxserver.models.cache.lease import LeaseFolder
os.umask(int(sys.argv[2], 8))
folder = LeaseFolder(Path(sys.argv[1]), 600.0)
assert folder.try_acquire("{KEY}")
folder.in_use("{KEY}").__enter__()
os._exit(0)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize("umask", ["002", "022"])
def test_a_dead_replica_of_another_user_is_taken_over(umask: str) -> None:
    """With umask 022 the other one's files cannot be written, only read.

    Not below pytest's own folder: each session of pytest on this machine closes that to other users again.
    """
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        folder.chmod(0o777)
        for name in ("leases", "uses"):
            (folder / name).mkdir()
            (folder / name).chmod(0o777)
        subprocess.run([sys.executable, "-c", DIES, str(folder), umask], check=True)

        def take_over() -> None:
            theirs = LeaseFolder(folder, 600.0)
            assert not theirs.is_used(KEY)
            lease = theirs.try_acquire(KEY)
            assert lease
            assert lease.generation == 2
            theirs.close()

        assert as_another_user(take_over) == 0

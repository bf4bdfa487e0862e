"""Leases and use marks: between servers of one machine, and between machines that share Redis."""

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

from mxserver.models.cache import lease as lease_module
from mxserver.models.cache.lease import LeaseFolder
from mxserver.models.errors import LeaseLost
from mxserver.store.redis import RedisLocks
from tests.server.redis_process import shared_redis
from tests.small_disk import SmallDisk

KEY = "0" * 32


Make = Callable[..., LeaseFolder]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """Opens the folder as one server more: of this machine, or of another one over the same Redis."""
    made: list[LeaseFolder] = []

    def build(seconds: float = 60.0, *, elsewhere: bool = False) -> LeaseFolder:
        if elsewhere:  # locks of files are this machine's own
            monkeypatch.setattr(lease_module, "locks_work", lambda _: False)
        shared = RedisLocks(shared_redis().url, f"{tmp_path}:") if elsewhere else None
        made.append(LeaseFolder(tmp_path, seconds, shared))
        return made[-1]

    yield build
    for folder in made:
        folder.close()


def until(condition: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


both = pytest.mark.parametrize("elsewhere", [False, True], ids=["one machine", "machines that share Redis"])


@both
def test_one_at_a_time(make: Make, elsewhere: bool) -> None:
    ours, theirs = (make(elsewhere=elsewhere) for _ in range(2))
    lease = ours.try_acquire(KEY)
    assert lease
    assert theirs.try_acquire(KEY) is None
    assert ours.try_acquire(KEY) is None
    assert theirs.is_leased(KEY)
    assert KEY in theirs.busy()
    assert theirs.try_acquire("1" * 32)
    lease.check()
    ours.release(lease)
    assert not theirs.is_leased(KEY)
    following = theirs.try_acquire(KEY)
    assert following
    assert following.token != lease.token
    ours.release(lease)  # again: it changes nothing of the other's
    following.check()
    assert ours.try_acquire(KEY) is None


@both
def test_exactly_one_of_many_wins(make: Make, elsewhere: bool) -> None:
    folders = [make(elsewhere=elsewhere) for _ in range(8)]
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


@both
def test_two_are_never_inside(make: Make, elsewhere: bool) -> None:
    """The finding H3: 292 of 14,364 acquisitions overlapped (proofs/server/p8b.py)."""
    inside: list[LeaseFolder] = []
    overlaps: list[int] = []

    def work(folder: LeaseFolder) -> None:
        taken = 0
        while taken < 25:
            if lease := folder.try_acquire(KEY):
                inside.append(folder)
                overlaps.append(len(inside))
                inside.remove(folder)
                folder.release(lease)
                taken += 1

    threads = [threading.Thread(target=work, args=(make(elsewhere=elsewhere),)) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(overlaps) == {1}
    assert len(overlaps) == 150


def test_a_holder_elsewhere_that_went_silent_is_followed(make: Make) -> None:
    silent, ours = make(0.5, elsewhere=True), make(0.5, elsewhere=True)
    lease = silent.try_acquire(KEY)
    assert lease
    silent._keeper.stop()  # as a machine that is cut off
    assert ours.try_acquire(KEY) is None
    until(lambda: ours.try_acquire(KEY) is not None)
    with pytest.raises(LeaseLost):
        lease.check()
    silent.release(lease)
    assert ours.is_leased(KEY)


def test_a_holder_that_was_stopped_for_longer_has_lost_its_lease(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also before it could ask Redis again: it may not go on for a moment."""
    folder = make(60, elsewhere=True)
    lease = folder.try_acquire(KEY)
    assert lease
    lease.check()
    lease._held.extended_at -= 61
    with pytest.raises(LeaseLost, match="not extended in time"):
        lease.check()


def test_a_living_holder_elsewhere_keeps_its_lease_past_the_time(make: Make) -> None:
    theirs, ours = make(0.6, elsewhere=True), make(0.6, elsewhere=True)
    lease = theirs.try_acquire(KEY)
    assert lease
    begun = lease._held.extended_at
    until(lambda: lease._held.extended_at > begun + 1.2)
    assert ours.try_acquire(KEY) is None


def test_without_redis_nobody_else_gets_anything_and_marks_are_told_later(make: Make) -> None:
    """Locks that cannot be asked for count as taken. Reading goes on: removing needs a lease."""
    folder = make(60, elsewhere=True)
    away = _Away()
    folder._shared = away
    assert folder.try_acquire(KEY) is None
    assert folder.is_leased(KEY)
    with folder.in_use(KEY):
        away.is_back = True
        folder._extend()
        assert len(away.held) == 1
    assert away.held == set()


class _Away:
    """Shared locks of a Redis that comes back."""

    def __init__(self) -> None:
        self.is_back = False
        self.held: set[str] = set()

    def acquire(self, name: str, token: str, seconds: float) -> bool:
        if self.is_back:
            self.held.add(name)
        return self.is_back

    def extend(self, name: str, token: str, seconds: float) -> bool | None:
        return name in self.held if self.is_back else None

    def release(self, name: str, token: str) -> None:
        self.held.discard(name)

    def is_held(self, name: str) -> bool:
        return not self.is_back or name in self.held

    def close(self) -> None: ...


HOLDER = """
import sys
from pathlib import Path
from mxserver.models.cache.lease import LeaseFolder
folder = LeaseFolder(Path(sys.argv[1]), 600)
assert folder.try_acquire(sys.argv[2])
with folder.in_use(sys.argv[2]):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_killed_process_is_followed_at_once(make: Make, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path), KEY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout
    assert process.stdin
    assert process.stdout.readline() == "held\n"
    ours = make(600)
    assert ours.try_acquire(KEY) is None
    assert ours.is_used(KEY)
    process.kill()
    process.wait()
    process.stdin.close()
    process.stdout.close()
    assert ours.try_acquire(KEY)
    assert not ours.is_used(KEY)


@both
def test_use_marks(make: Make, tmp_path: Path, elsewhere: bool) -> None:
    ours, theirs = make(elsewhere=elsewhere), make(elsewhere=elsewhere)
    with ours.in_use(KEY), ours.in_use(KEY):
        with ours.in_use(KEY):
            assert theirs.is_used(KEY)
        assert theirs.is_used(KEY)
        assert not theirs.is_used("1" * 32)
    assert not theirs.is_used(KEY)
    assert not [name for name in os.listdir(tmp_path / "uses") if not name.startswith(".clock")]  # noqa: PTH208


def test_waiting_ends_when_the_server_stops(make: Make) -> None:
    folder, stopping = make(), threading.Event()
    assert folder.try_acquire(KEY)
    stopping.set()
    with pytest.raises(LeaseLost, match="is stopping"), folder.acquired(KEY, stopping):
        pass


def test_close_lets_go(make: Make) -> None:
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
        assert other.try_acquire("k") is not None
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
            assert theirs.try_acquire(KEY)
            theirs.close()

        assert as_another_user(take_over) == 0

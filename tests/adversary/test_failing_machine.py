"""The disk, Redis, the clock and the process itself fail while honest workers go on."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Callable

import grpc
import pytest

from tests.adversary.conftest import AFTER_SECONDS, ATTACK_SECONDS, LEASE_SECONDS, STORE, Attacked
from tests.adversary.honest import BYSTANDERS, judge
from tests.adversary.machine import FaultyDisk, WallClock

sqlite_only = pytest.mark.skipif(STORE != "sqlite", reason="the store keeps nothing on this disk")
redis_only = pytest.mark.skipif(STORE != "redis", reason="there is no Redis")
READINESS = ("readyz", "health")


def keep_publishing(attacked: Attacked, stop: threading.Event, threads: int = 8) -> list[threading.Thread]:
    """Publishes until the event: what is acknowledged must not be lost."""

    def publish(number: int) -> None:
        count = 0
        while not stop.wait(0.2) and count < 20:
            count += 1
            with contextlib.suppress(grpc.RpcError):
                attacked.honest.publish(f"publisher-{number}-{count}")

    started = [threading.Thread(target=publish, args=(number,), daemon=True) for number in range(threads)]
    for thread in started:
        thread.start()
    return started


def settle(attacked: Attacked) -> None:
    """Time for one heartbeat of everybody."""
    attacked.honest.observe(LEASE_SECONDS / 3 + 1)


@sqlite_only
def test_a_slow_disk(start: Callable[..., Attacked], disk: FaultyDisk) -> None:
    """A tenth of 12 s for each sync: publishes wait, nothing else does, and the server stays ready."""
    attacked = start(disk.environ)
    stop = threading.Event()
    disk.is_slow(1.2)
    publishers = keep_publishing(attacked, stop)
    during = attacked.honest.observe(ATTACK_SECONDS)
    stop.set()
    disk.works()
    for one in publishers:
        one.join()
    after = attacked.honest.observe(AFTER_SECONDS)
    judge(during, "on a slow disk")
    judge(after, "after a slow disk")
    assert len(attacked.honest.published) > BYSTANDERS + 1


@sqlite_only
@pytest.mark.parametrize("fault", ["is_full", "is_read_only"])
def test_a_disk_that_refuses_and_comes_back(start: Callable[..., Attacked], disk: FaultyDisk, fault: str) -> None:
    """Heartbeats and listings go on. Readiness says what publishers find, and is back with the disk."""
    attacked = start(disk.environ)
    stop = threading.Event()
    publishers = keep_publishing(attacked, stop)
    getattr(disk, fault)()
    during = attacked.honest.observe(ATTACK_SECONDS)
    disk.works()
    stop.set()
    for one in publishers:
        one.join()
    settle(attacked)
    after = attacked.honest.observe(AFTER_SECONDS)
    judge(during, f"on a disk that {fault}", READINESS)
    assert during.failures.get("readyz"), "publishes failed, and the server called itself ready"
    judge(after, f"after a disk that {fault}")


@redis_only
def test_redis_that_hangs_for_5_s(attacked: Attacked) -> None:
    assert attacked.redis is not None
    assert attacked.redis.process is not None
    attacked.redis.process.send_signal(signal.SIGSTOP)
    during = attacked.honest.observe(5)
    attacked.redis.process.send_signal(signal.SIGCONT)
    settle(attacked)
    after = attacked.honest.observe(AFTER_SECONDS)
    judge(during, "without Redis", ("heartbeat", "listing", "bystanders", *READINESS))
    judge(after, "after Redis hung")


@redis_only
def test_redis_that_is_killed_and_comes_back(attacked: Attacked) -> None:
    assert attacked.redis is not None
    attacked.redis.kill()
    during = attacked.honest.observe(5)
    attacked.redis.start()
    settle(attacked)
    after = attacked.honest.observe(AFTER_SECONDS)
    judge(during, "without Redis", ("heartbeat", "listing", "bystanders", *READINESS))
    judge(after, "after Redis was killed")


@pytest.mark.parametrize("seconds", [-7200, 7200], ids=["back", "forward"])
def test_the_wall_clock_is_set(start: Callable[..., Attacked], wall_clock: WallClock, seconds: int) -> None:
    """By two hours, while workers publish; epochs go on growing."""
    attacked = start(wall_clock.environ)
    before = max(attacked.honest.published.values())
    wall_clock.shift(seconds)
    during = attacked.honest.observe(ATTACK_SECONDS)
    attacked.honest.publish("later")
    judge(during, f"the clock was set by {seconds} s")
    judge(attacked.honest.observe(AFTER_SECONDS), f"after the clock was set by {seconds} s")
    assert attacked.honest.published["later"] > before


def test_a_server_that_was_stopped_for_longer_than_a_lease(attacked: Attacked) -> None:
    """SIGSTOP, as a suspended machine: nobody is STALE in the first listing after it, nor later."""
    attacked.server.signal(signal.SIGSTOP)
    time.sleep(LEASE_SECONDS + 3)  # longer than a lease, which is what happens here
    attacked.honest.take()
    attacked.server.signal(signal.SIGCONT)
    waking = attacked.honest.observe(2)
    stale = [reason for reasons in waking.failures.values() for reason in reasons if "STALE" in reason]
    assert not stale, stale
    settle(attacked)
    judge(attacked.honest.observe(AFTER_SECONDS), "after the server was stopped")


@pytest.mark.parametrize("hostile", ["never_reads", "never_ends", "floods_calls"])
def test_the_end_amid_it(attacked: Attacked, hostile: str) -> None:
    """SIGTERM while a client is hostile: the server ends in time, and the next one knows everybody."""
    with attacked.under(hostile):  # from here on it is at it
        attacked.server.signal(signal.SIGTERM)
        began = time.monotonic()
        code = attacked.server.process.wait(30)
        took = time.monotonic() - began
    sys.stdout.write(f"ended with {code} after {took:.1f} s\n")
    assert code == 0
    published = dict(attacked.honest.published)
    attacked.honest.close()
    attacked.server.close()
    if STORE == "memory":
        return
    attacked.start(published)
    judge(attacked.honest.observe(AFTER_SECONDS), "after the server was started again")

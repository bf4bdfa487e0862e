"""Numbers between threads."""

from __future__ import annotations

import threading
import time

import pytest

from mxcore.nixl import Mailbox
from tests.transfer.conftest import wait_for

LONG_SECONDS = 3600.0  # nobody waits so long


def test_numbers_come_out_in_order_and_once() -> None:
    box = Mailbox()
    numbers = [*range(1000), 2**64 - 1]  # more than there is room for at first
    for number in numbers:
        box.put(number)
    assert box.take(LONG_SECONDS) == numbers
    assert box.take(0) == []
    assert box.take(-1.0) == []
    with pytest.raises(OverflowError):
        box.put(2**64)
    box.put(1)
    assert box.take(LONG_SECONDS) == [1]


def test_waking_ends_a_wait_before_it_or_in_it() -> None:
    box = Mailbox()
    box.wake()
    box.wake()
    assert box.take(LONG_SECONDS) == []
    taken: list[list[int]] = []
    thread = threading.Thread(target=lambda: taken.append(box.take(LONG_SECONDS)))
    thread.start()
    box.wake()
    thread.join(60)
    assert taken == [[]]


def test_a_wait_ends_by_itself() -> None:
    started = time.monotonic()
    assert Mailbox().take(0.02) == []
    assert time.monotonic() - started >= 0.02


def test_nothing_is_lost_between_many_who_put_and_one_who_takes() -> None:
    box = Mailbox()
    each, count = 2000, 4
    threads = [
        threading.Thread(target=lambda first=first: [box.put(first + i) for i in range(each)])  # type: ignore[misc]
        for first in range(0, count * each, each)
    ]
    for thread in threads:
        thread.start()
    taken: list[int] = []
    wait_for(lambda: taken.extend(box.take(1.0)) or len(taken) == count * each)
    for thread in threads:
        thread.join()
    assert sorted(taken) == list(range(count * each))
    for first in range(0, count * each, each):
        of_one = [number for number in taken if first <= number < first + each]
        assert of_one == sorted(of_one)

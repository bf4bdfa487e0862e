"""One end of plain TCP connections, in a process of its own: one sends for some seconds, the other takes what comes.

Started with a JSON object: `role` take (`address`, `connections`) or give (also `port` and `seconds`). The taker
says `listening` with its port and then `took`, the giver `gave`, each with its processor's seconds.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

_BLOCK_BYTES = 1 << 20
_ACCEPT_SECONDS = 60.0


def say(**values: Any) -> None:
    """One line."""
    sys.stdout.write(json.dumps(values) + "\n")
    sys.stdout.flush()


class Took(NamedTuple):
    """What came over one connection: bytes in all, those of the first read, when that and the last one returned."""

    total: int
    first_bytes: int
    first: float
    last: float


def counted(took: Sequence[Took]) -> tuple[int, float]:
    """Bytes, and the seconds in which they came.

    The clock starts as the first read of all returns. What each connection's first read brought had come before, into
    the system's buffer, and may be megabytes where the reader was late: it is not counted.
    """
    there = [each for each in took if each.total]
    if not there:
        return 0, 0.0
    seconds = max(each.last for each in there) - min(each.first for each in there)
    return sum(each.total - each.first_bytes for each in there), seconds


def take(address: str, connections: int) -> None:
    """From the first byte to the last of all connections."""
    with socket.create_server((address, 0), backlog=connections) as server:
        server.settimeout(_ACCEPT_SECONDS)
        say(event="listening", port=server.getsockname()[1])
        accepted = [server.accept()[0] for _ in range(connections)]
    took: list[Took] = []

    def drain(number: int) -> None:
        buffer = bytearray(_BLOCK_BYTES)
        with accepted[number] as connection:
            total = first_bytes = connection.recv_into(buffer)
            first = last = time.monotonic()
            while count := connection.recv_into(buffer):
                last = time.monotonic()
                total += count
        took.append(Took(total, first_bytes, first, last))

    _in_threads(drain, connections)
    count, seconds = counted(took)
    say(event="took", bytes=count, seconds=seconds, cpu_seconds=time.process_time())


def give(address: str, port: int, connections: int, seconds: float) -> None:
    """Sends as fast as it is taken."""
    block = memoryview(bytes(_BLOCK_BYTES))
    opened = [socket.create_connection((address, port), timeout=_ACCEPT_SECONDS) for _ in range(connections)]
    end = time.monotonic() + seconds

    def send(number: int) -> None:
        with opened[number] as connection:
            while time.monotonic() < end:
                connection.sendall(block)

    _in_threads(send, connections)
    say(event="gave", cpu_seconds=time.process_time())


def _in_threads(run: Callable[[int], None], count: int) -> None:
    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _end_with_input() -> None:
    sys.stdin.read()
    os._exit(0)


def main() -> None:
    """One end."""
    task = json.loads(sys.argv[1])
    following = threading.Thread(target=_end_with_input, daemon=True)
    following.start()
    if task["role"] == "take":
        take(task["address"], task["connections"])
    else:
        give(task["address"], task["port"], task["connections"], task["seconds"])
    following.join()


if __name__ == "__main__":
    main()

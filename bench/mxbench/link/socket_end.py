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
from collections.abc import Callable
from typing import Any

_BLOCK_BYTES = 1 << 20
_ACCEPT_SECONDS = 60.0


def say(**values: Any) -> None:
    """One line."""
    sys.stdout.write(json.dumps(values) + "\n")
    sys.stdout.flush()


def take(address: str, connections: int) -> None:
    """From the first byte to the last of all connections."""
    with socket.create_server((address, 0), backlog=connections) as server:
        server.settimeout(_ACCEPT_SECONDS)
        say(event="listening", port=server.getsockname()[1])
        accepted = [server.accept()[0] for _ in range(connections)]
    took: list[tuple[int, float, float]] = []

    def drain(number: int) -> None:
        buffer = bytearray(_BLOCK_BYTES)
        total, first, last = 0, 0.0, 0.0
        with accepted[number] as connection:
            while count := connection.recv_into(buffer):
                last = time.monotonic()
                first = first or last
                total += count
        took.append((total, first, last))

    _in_threads(drain, connections)
    begins = [first for _, first, _ in took if first]
    seconds = max(last for _, _, last in took) - min(begins, default=0.0)
    say(event="took", bytes=sum(total for total, _, _ in took), seconds=seconds, cpu_seconds=time.process_time())


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

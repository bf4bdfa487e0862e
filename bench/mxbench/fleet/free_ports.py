"""Ports of the loopback interface for processes that are told theirs before they start."""

from __future__ import annotations

import contextlib
import random
import socket
from pathlib import Path

LOWEST = 10_000
TRIES = 1000

_random = random.SystemRandom()  # processes that choose at the same time choose differently


def free_port(following: int = 0) -> int:
    """A port that is free, as are the `following` ones after it. OSError when none was found.

    The port lies below those that the kernel gives to outgoing connections and to processes that ask for any port:
    another connection could take one of those before the process that it is for has bound it.
    """
    first_given = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    highest = (first_given if first_given > LOWEST + following + 1 else 1 << 16) - following
    for _ in range(TRIES):
        port = _random.randrange(LOWEST, highest)
        with contextlib.suppress(OSError), contextlib.ExitStack() as held:
            for each in range(port, port + following + 1):
                held.enter_context(socket.create_server(("127.0.0.1", each)))
            return port
    raise OSError(f"no {following + 1} free ports in a row between {LOWEST} and {highest} in {TRIES} tries")

"""Ports for processes that bind theirs later than they are told."""

from __future__ import annotations

import random
import socket
from pathlib import Path

import pytest

from mxbench.fleet import free_ports
from mxbench.fleet.free_ports import free_port


def test_nobody_else_is_given_it() -> None:
    """The kernel gives ports of its range to connections, and to whoever asks for any: ours is none of them."""
    lowest, _ = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    for _ in range(50):
        port = free_port(following=2)
        assert port + 2 < lowest
        for each in range(port, port + 3):
            socket.create_server(("127.0.0.1", each)).close()


def test_a_port_in_use_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", free_port())) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setattr(free_ports, "_random", Chosen([port - 1, port, port + 1]))
        assert free_port(following=1) == port + 1

        monkeypatch.setattr(free_ports, "_random", Chosen([port] * free_ports.TRIES))
        with pytest.raises(OSError, match="no 1 free ports in a row"):
            free_port()


class Chosen(random.Random):
    """Gives what it was told to give."""

    def __init__(self, ports: list[int]) -> None:
        super().__init__()
        self._ports = ports

    def randrange(self, *_: object) -> int:
        return self._ports.pop(0)

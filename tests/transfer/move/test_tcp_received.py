"""The kernel's count of what came through this process' sockets."""

from __future__ import annotations

import fcntl
import os
import socket
import subprocess
import sys
from pathlib import Path

from mxcore.transfer.move import TcpByteCounter
from mxcore.transfer.move.tcp_received import tcp_received


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        one = socket.create_connection(server.getsockname(), timeout=60)
        other, _ = server.accept()
    return one, other


def send(one: socket.socket, other: socket.socket, count: int) -> None:
    one.sendall(bytes(count))
    while count:
        count -= len(other.recv(count))


def test_each_connection_has_its_count() -> None:
    one, other = pair()
    with one, other:
        send(one, other, 100_000)
        send(other, one, 7)
        counts = tcp_received()
        assert counts[os.fstat(other.fileno()).st_ino] == 100_000
        assert counts[os.fstat(one.fileno()).st_ino] == 7


def test_what_is_no_tcp_connection_is_not_counted() -> None:
    before = tcp_received()
    left, right = socket.socketpair()
    with left, right, socket.socket(socket.AF_INET, socket.SOCK_DGRAM):
        left.sendall(b"x")
        assert tcp_received().keys() <= before.keys()


def test_connections_that_were_there_before_do_not_count() -> None:
    old = pair()
    watch = TcpByteCounter()
    new = pair()
    with old[0], old[1], new[0], new[1]:
        send(*new, 10)
        watch.reset()
        send(*old, 50_000)
        assert watch.bytes() == 0
        send(*new, 3000)
        assert watch.bytes() == 3000
        watch.reset()
        assert watch.bytes() == 0


def test_connections_stay_blocking_under_a_default_timeout() -> None:
    """Whether a descriptor blocks is shared with its copies: UCX's and gRPC's sockets are not ours to change."""
    one, other = pair()
    with one, other:
        for each in (one, other):
            os.set_blocking(each.fileno(), True)
        before = socket.getdefaulttimeout()
        socket.setdefaulttimeout(30)
        try:
            assert os.fstat(other.fileno()).st_ino in tcp_received()
        finally:
            socket.setdefaulttimeout(before)
        assert os.get_blocking(one.fileno())
        assert os.get_blocking(other.fileno())


def test_no_descriptor_is_left_open() -> None:
    one, other = pair()
    with one, other:
        before = descriptors()
        for _ in range(20):
            tcp_received()
        assert descriptors() == before


def test_locks_of_the_process_stay(tmp_path: Path) -> None:
    """Closing any descriptor of a file, a copy too, drops the process' POSIX locks on it (fcntl(2))."""
    path = tmp_path / "locked"
    take = "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'r+'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    with path.open("w") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        tcp_received()
        other = subprocess.run([sys.executable, "-c", take, str(path)], capture_output=True, text=True, check=False)
    assert "BlockingIOError" in other.stderr

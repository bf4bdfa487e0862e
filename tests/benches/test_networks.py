"""Networks of namespaces beside each other: each has addresses of its own."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from contextlib import ExitStack

import pytest

from mxbench.fleet.fleet import Network

SAYS = (
    "import socket, sys\n"
    "with socket.create_server((sys.argv[1], 9500)) as server:\n"
    "    print('listening', flush=True)\n"
    "    connection, _ = server.accept()\n"
    "    connection.sendall(sys.argv[2].encode())\n"
    "    connection.close()\n"
)


@pytest.mark.skipif(
    bool(os.geteuid()) or not shutil.which("ip") or not shutil.which("tc"), reason="it needs root and iproute2"
)
def test_two_at_once_are_both_reached() -> None:
    with ExitStack() as stack:
        networks = [stack.enter_context(Network(1, 100.0)) for _ in range(2)]
        for number, network in enumerate(networks):
            command = [*network.prefix(0), sys.executable, "-c", SAYS, network.address(0), f"network {number}"]
            process = stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
            assert process.stdout is not None
            assert process.stdout.readline() == "listening\n"
        for number, network in enumerate(networks):
            with socket.create_connection((network.address(0), 9500), timeout=10) as connection:
                assert connection.recv(100).decode() == f"network {number}"

"""Two network namespaces on a bridge, a server on the bridge's host, and the examples as processes in them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mxbench.fleet.fleet import Network

ROOT = Path(__file__).parents[2]
MEGABITS = 2000
START_SECONDS = 60.0
SETTINGS = {"MX_TRANSPORT": "tcp", "MX_STALL_TIMEOUT_SECS": "20", "MX_SERVER_TIMEOUT_SECS": "60"}

Example = subprocess.Popen[str]
Start = Callable[..., Example]


@pytest.fixture(scope="session")
def network() -> Iterator[Network]:
    if os.geteuid() or not shutil.which("ip") or not shutil.which("tc"):
        pytest.skip("network namespaces need root and iproute2")
    with Network(2, MEGABITS) as made:
        yield made


@pytest.fixture(scope="session")
def server(network: Network, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """host:port of a server that both namespaces reach."""
    log = tmp_path_factory.mktemp("server") / "log"
    command = [sys.executable, "-m", "mxserver", "--host", network.host, "--port", "0", "--metrics-port", "0"]
    with log.open("w") as output:
        process = subprocess.Popen([*command, "--store", "memory"], stderr=output, cwd=ROOT)
    deadline = time.monotonic() + START_SECONDS
    while not (found := re.findall(r"listening on (\S+)", log.read_text())):
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)
    yield found[0]
    process.terminate()
    assert process.wait(60) == 0


@pytest.fixture
def start(network: Network, server: str) -> Iterator[Start]:
    """Starts an example in namespace 0 or 1; ended after the test."""
    started: list[Example] = []

    def run(place: int, script: str, *arguments: str, **settings: str) -> Example:
        names = {name: value for name, value in os.environ.items() if not name.startswith(("MX_", "MODEL_", "AWS_"))}
        names |= {"MODEL_EXPRESS_URL": server, "MX_WORKER_HOST": network.address(place), **SETTINGS, **settings}
        command = [*network.prefix(place), sys.executable, "-W", "error", f"examples/{script}", *arguments]
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        started.append(subprocess.Popen(command, cwd=ROOT, env=names, text=True, bufsize=1, **pipes))
        return started[-1]

    yield run
    for process in started:
        process.kill()
        process.communicate()


def line_of(process: Example) -> str:
    """The next line that it prints; fails with its errors when it has ended."""
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, process.communicate()[1]
    return line.rstrip("\n")


def output_of(process: Example) -> list[str]:
    """What it prints until it ends, well and without a word on stderr."""
    said, errors = process.communicate(timeout=120)
    assert (process.returncode, errors) == (0, ""), errors
    return said.splitlines()

"""The wire of `make test-rdma` (tools/soft_rdma/network.sh): a worker's port at one end, this process' at the other."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from mxcore.transfer.route import usable_ports
from tests.transfer.conftest import RDMA_PORTS, nothing_left, start_worker, wait_for

__all__ = ["nothing_left", "start_worker"]

ENDS = {"mxa": ("10.9.0.1", "10.9.0.2"), "mxb": ("10.9.0.2", "10.9.0.1")}  # with its address and the other's


class Wire:
    """Says how the wire treats packets, both ways; `mend` makes it whole, and its ports active."""

    def slow(self) -> None:
        """8 MB a second, so that READs are under way for a while."""
        self._shape("rate", "64mbit", "limit", "10000")

    def cut(self) -> None:
        """Nothing arrives, though both ports stay active."""
        self._shape("loss", "100%")

    def take_down(self, end: str) -> None:
        """The link of one end, and with it the ports of both."""
        self._ip("link", "set", end, "down")

    def mend(self) -> None:
        for end, (address, other) in ENDS.items():
            subprocess.run(["tc", "qdisc", "delete", "dev", end, "root"], check=False, stderr=subprocess.DEVNULL)
            self._ip("link", "set", end, "up")
            # network.sh made it, taking the link down removed it
            self._ip("route", "replace", f"{other}/32", "dev", end, "src", address, "table", "100")
        wait_for(lambda: len(usable_ports(environ={})) == len(ENDS))

    def _ip(self, *words: str) -> None:
        subprocess.run(["ip", *words], check=True)

    def _shape(self, *how: str) -> None:
        for end in ENDS:
            subprocess.run(["tc", "qdisc", "replace", "dev", end, "root", "netem", *how], check=True)


@pytest.fixture
def wire() -> Iterator[Wire]:
    value = Wire()
    yield value
    value.mend()


def packets_sent(port: str) -> int:
    """By the device of a port, since it was made; 1024 bytes each at most."""
    device, _, number = port.partition(":")
    folder = Path("/sys/class/infiniband") / device / "ports" / number / "hw_counters"
    return int((folder / "sent_pkts").read_text())


@pytest.fixture
def workers_port() -> str:
    return RDMA_PORTS[0]

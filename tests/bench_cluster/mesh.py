"""Network namespaces as machines: a shaped link between each two of them, and one each to this one, where ssh goes."""

from __future__ import annotations

import itertools
import os
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Self

HEADERS = 66  # Ethernet, IPv4 and TCP with time stamps
FRAME = 1514


class Mesh:
    """`count` namespaces; a link between two carries `megabits` a second each way, or what `others` say. Needs root."""

    def __init__(self, count: int, megabits: float, others: Mapping[tuple[int, int], float] | None = None) -> None:
        self.count, self.megabits = count, megabits
        self._others = others or {}
        self._tag = f"mc{os.getpid() % 100000}"

    def space(self, number: int) -> str:
        return f"{self._tag}n{number}"

    def prefix(self, number: int) -> list[str]:
        """Runs a command in a namespace."""
        return ["ip", "netns", "exec", self.space(number)]

    def ssh_address(self, number: int) -> str:
        return f"10.214.0.{number + 2}"

    def address(self, number: int) -> str:
        """By which the others reach it."""
        return f"10.215.0.{number + 1}"

    def gbps(self, one: int, other: int) -> float:
        """What the link between two carries of a TCP connection's bytes, 10^9 a second."""
        megabits = self._others.get((one, other), self._others.get((other, one), self.megabits))
        return megabits * (FRAME - HEADERS) / FRAME / 8e3

    def __enter__(self) -> Self:
        try:
            self._make()
        except BaseException:
            self.close()
            raise
        return self

    def _make(self) -> None:
        bridge = f"{self._tag}b"
        run("ip", "link", "add", bridge, "type", "bridge")
        run("ip", "addr", "add", "10.214.0.1/24", "dev", bridge)
        run("ip", "link", "set", bridge, "up")
        for number in range(self.count):
            space = self.space(number)
            run("ip", "netns", "add", space)
            run("ip", "link", "add", f"{self._tag}v{number}", "type", "veth", "peer", "name", "ssh", "netns", space)
            run("ip", "link", "set", f"{self._tag}v{number}", "master", bridge, "up")
            run("ip", "-n", space, "addr", "add", f"{self.ssh_address(number)}/24", "dev", "ssh")
            for link in ("lo", "ssh"):
                run("ip", "-n", space, "link", "set", link, "up")
        for one, other in itertools.combinations(range(self.count), 2):
            ends = (one, f"to{other}"), (other, f"to{one}")
            peer = ["peer", "name", ends[1][1], "netns", self.space(other)]
            run("ip", "-n", self.space(one), "link", "add", ends[0][1], "type", "veth", *peer)
            megabits = self._others.get((one, other), self.megabits)
            for (number, link), target in zip(ends, (other, one), strict=True):
                inside = ["ip", "-n", self.space(number)]
                run(*inside, "addr", "add", f"{self.address(number)}/32", "dev", link)  # UCX wants one on each
                run(*inside, "link", "set", link, "up")
                run(*inside, "route", "add", f"{self.address(target)}/32", "dev", link, "src", self.address(number))
                self._shape(number, link, megabits)

    def _shape(self, number: int, link: str, megabits: float) -> None:
        shape = ["rate", f"{megabits}mbit", "burst", "64kb", "latency", "50ms"]
        run("tc", "-n", self.space(number), "qdisc", "replace", "dev", link, "root", "tbf", *shape)

    @contextmanager
    def slower(self, one: int, other: int, factor: float) -> Iterator[None]:
        """For a while the link between two carries only this part."""
        megabits = self._others.get((one, other), self.megabits)
        ends = (one, f"to{other}"), (other, f"to{one}")
        for number, link in ends:
            self._shape(number, link, factor * megabits)
        try:
            yield
        finally:
            for number, link in ends:
                self._shape(number, link, megabits)

    def close(self) -> None:
        for number in range(self.count):
            subprocess.run(["ip", "netns", "del", self.space(number)], check=False, capture_output=True)
        subprocess.run(["ip", "link", "del", f"{self._tag}b"], check=False, capture_output=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def run(*command: str) -> None:
    ran = subprocess.run(command, check=False, capture_output=True, text=True)
    assert not ran.returncode, f"{' '.join(command)}: {ran.stderr}"

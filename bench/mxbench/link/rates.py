"""Rates of a link, from one host to another, 10^9 bytes a second. Each raises HostError where it cannot be had."""

from __future__ import annotations

import time
from typing import NamedTuple

from mxbench.hosts import Host, HostError

__all__ = ["SocketRate", "nixl_rate", "socket_rate", "verbs_rate"]

_VERBS_PORT = 18515
_VERBS_START_SECONDS = 1.0
_MORE_SECONDS = 60.0


class SocketRate(NamedTuple):
    """Of plain connections: GB/s, and seconds of the processor for 10^9 bytes on either side."""

    gbps: float
    giver_cpu_seconds_per_gb: float
    taker_cpu_seconds_per_gb: float


def socket_rate(giver: Host, taker: Host, connections: int, seconds: float) -> SocketRate:
    """Plain TCP, so many connections at once for about so long."""
    taking = taker.spawn("sockets", {"role": "take", "address": taker.address, "connections": connections})
    port = taking.expect("listening")["port"]
    task = {"role": "give", "address": taker.address, "port": port, "connections": connections, "seconds": seconds}
    giving = giver.spawn("sockets", task)
    took = taking.expect("took", seconds + _MORE_SECONDS)
    gave = giving.expect("gave", _MORE_SECONDS)
    for child in (taking, giving):
        child.end()
    if not took["bytes"] or took["seconds"] <= 0:
        raise HostError(f"nothing came from {giver.name} to {taker.name}")
    gigabytes = took["bytes"] / 1e9
    return SocketRate(gigabytes / took["seconds"], gave["cpu_seconds"] / gigabytes, took["cpu_seconds"] / gigabytes)


def nixl_rate(giver: Host, taker: Host, transport: str, size_bytes: int, rounds: int) -> list[float]:
    """One descriptor by NIXL, each round's rate; the first, which connects, is left out.

    Over TCP the giver WRITEs, otherwise the taker READs.
    """
    ends = [host.spawn("nixl", {"transport": transport, "bytes": size_bytes}) for host in (giver, taker)]
    told = [end.expect("ready") for end in ends]
    mover, other = (ends[0], told[1]) if transport == "tcp" else (ends[1], told[0])
    mover.send(f"connect {other['metadata']} {other['address']}")
    mover.expect("connected")
    mover.send(f"move {rounds + 1}")
    seconds = mover.expect("moved", 600.0)["seconds"][1:]
    for end in ends:
        end.end()
    return [size_bytes / each / 1e9 for each in seconds]


def verbs_rate(giver: Host, taker: Host, seconds: float) -> float:
    """By ib_write_bw."""
    task = {"port": _VERBS_PORT, "seconds": seconds, "address": taker.address}
    taking = taker.spawn("verbs", {**task, "role": "take"})
    taking.expect("waiting")
    time.sleep(_VERBS_START_SECONDS)  # perftest does not say when it listens
    giving = giver.spawn("verbs", {**task, "role": "give"})
    moved = giving.expect("moved", seconds + _MORE_SECONDS)
    for child in (taking, giving):
        child.end()
    return float(moved["gbps"])

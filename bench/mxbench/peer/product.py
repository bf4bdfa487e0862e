"""A model from one host to another by the product's own transfer: every byte verified, the processors' seconds told."""

from __future__ import annotations

from typing import Any, NamedTuple

from mxbench.fleet import Shape, total_bytes
from mxbench.hosts import Child, Host, HostError
from mxcore.transfer.layout import CHUNK_BYTES

__all__ = ["TRANSPORTS", "Received", "received", "worker_environ"]

TRANSPORTS: dict[str, dict[str, str]] = {
    "tcp": {"MX_TRANSPORT": "tcp"},
    "tcp-by-nixl": {"MX_TRANSPORT": "tcp", "MX_TCP_TRANSFER": "nixl"},
    "rdma": {"MX_TRANSPORT": "rdma"},
    "same-host": {"MX_TRANSPORT": "same-host"},
}
"""Name → settings of both workers. `tcp` are connections of our own, `tcp-by-nixl` is UCX's WRITE."""

_RECEIVE_SECONDS = 3600.0
_STALL_SECONDS = "30"  # a slow link is no failure here


class Received(NamedTuple):
    """One round. `whole`: with finding the source, connecting and registering. Rates are 10^9 bytes a second."""

    gbps: float
    whole_gbps: float
    giver_cpu_seconds_per_gb: float
    taker_cpu_seconds_per_gb: float


def worker_environ(host: Host, server: str, transport: str) -> dict[str, str]:
    """Settings of a worker there."""
    return {
        "MX_SERVER_ADDRESS": server,
        "MX_WORKER_HOST": host.address,
        "MX_STALL_TIMEOUT_SECS": _STALL_SECONDS,
        "MX_TRANSFER_TIMEOUT": str(int(_RECEIVE_SECONDS)),
        **TRANSPORTS[transport],
    }


def received(
    giver: Host,
    taker: Host,
    server: str,
    transport: str,
    shape: Shape,
    rounds: int,
    *,
    device: int | None = None,
) -> list[Received]:
    """Rounds of one model. `device`: the CUDA device that it is on, at both. Raises HostError, also for wrong bytes."""
    task = {
        "model": f"bench/peer/{giver.name}/{transport}",
        "content": 5,
        "shape": shape,
        "chunk_bytes": CHUNK_BYTES,
        "strategy": "star",
        "tells": False,
        "device": device,
    }
    source = giver.spawn("worker", {**task, "role": "seed"}, worker_environ(giver, server, transport))
    target = taker.spawn("worker", {**task, "role": "receiver"}, worker_environ(taker, server, transport))
    try:
        source.expect("serving")
        target.expect("ready")
        found = []
        for number in range(rounds):
            if number:
                target.send("again")
                target.expect("ready")
            found.append(_round(source, target, transport, total_bytes(shape)))
        return found
    finally:
        for child in (target, source):
            child.end()


def _round(source: Child, target: Child, transport: str, count: int) -> Received:
    before = _cpu_seconds(source)
    target.send("start")
    done = target.expect("done", _RECEIVE_SECONDS)
    burnt = _cpu_seconds(source) - before
    if problem := _problem(done, transport):
        raise HostError(f"{source.host.name} -> {target.host.name}, {transport}: {problem}")
    gigabytes = count / 1e9
    return Received(
        gigabytes / done["moving_seconds"],
        gigabytes / done["receive_seconds"],
        burnt / gigabytes,
        done["cpu_seconds"] / gigabytes,
    )


def _problem(done: dict[str, Any], transport: str) -> str:
    if not done["right"]:
        return "wrong bytes arrived"
    if done["path"] != "p2p":
        return f"nothing came from the other side: {'; '.join(done['failures']) or 'no source was found'}"
    came = done["transport"]
    return "" if transport.startswith(came) else f"it came by {came}: {'; '.join(done['failures']) or 'no reason told'}"


def _cpu_seconds(child: Child) -> float:
    child.send("cpu")
    return float(child.expect("cpu")["seconds"])

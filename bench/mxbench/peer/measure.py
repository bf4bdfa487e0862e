"""The measurements of `mx bench peer`: each direction, raw and by the product; what fails costs its own figures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Any, NamedTuple

from mxbench.fleet import scaled
from mxbench.hosts import Host, HostError
from mxbench.link import nixl_rate, socket_rate, verbs_rate
from mxbench.peer.product import received

__all__ = ["CONNECTIONS", "DIRECTIONS", "Asked", "Found", "measure"]

CONNECTIONS = (1, 2, 4)
DIRECTIONS = ("take", "give")  # of whoever connects


class Asked(NamedTuple):
    """What is measured: `size_bytes` of each model, `seconds` of plain connections, rounds of everything."""

    size_bytes: int
    rounds: int
    seconds: float
    transports: Sequence[str]
    directions: Sequence[str]
    shapes: Sequence[str]


@dataclass
class Found:
    """Figure → its rounds; what could not be measured → why."""

    samples: dict[str, list[float]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    def rate(self, name: str) -> float:
        """A figure's median."""
        return median(self.samples[name])

    def link(self, direction: str) -> tuple[str, float]:
        """The best raw way in that direction, and its rate; empty where none worked."""
        raw = [name for name in self.samples if name.startswith(f"{direction}_link_")]
        best = max(raw, key=self.rate, default="")
        return best.removeprefix(f"{direction}_link_").removesuffix("_gbps"), self.rate(best) if best else 0.0

    def best(self, direction: str) -> tuple[str, float]:
        """The product's best transport over the network in that direction, and its rate; empty where none worked."""
        ours = [
            name
            for name in self.samples
            if name.startswith(f"{direction}_")
            and name.endswith(("_few_gbps", "_many_gbps"))
            and "same_host" not in name
        ]
        best = max(ours, key=self.rate, default="")
        return best.removeprefix(f"{direction}_").rpartition("_gbps")[0], self.rate(best) if best else 0.0


def measure(here: Host, there: Host, asked: Asked, server: str, say: Callable[[str], None]) -> Found:
    """Everything that was asked for. `server`: address of a server that both reach."""
    found = Found()
    machines = {host.name: host.machine() for host in (here, there)}
    transports, memories = _possible(machines, asked, found)
    for direction in asked.directions:
        giver, taker = (there, here) if direction == "take" else (here, there)
        _raw(giver, taker, direction, asked, transports, found, say)
        for memory, device in memories.items():
            for transport in transports:
                for shape in asked.shapes:
                    name = f"{direction}_{transport}_{memory}{shape}".replace("-", "_")
                    say(f"{giver.name} -> {taker.name}: {transport}, {memory or 'host_'}{shape}")
                    try:
                        rounds = received(
                            giver,
                            taker,
                            server,
                            transport,
                            scaled(shape, asked.size_bytes),
                            asked.rounds,
                            device=device,
                        )
                    except HostError as error:
                        found.left_out[name] = str(error)
                        continue
                    for at, field_name in enumerate(rounds[0]._fields):
                        found.samples[f"{name}_{field_name}"] = [row[at] for row in rounds]
    return found


def _possible(
    machines: dict[str, dict[str, Any]], asked: Asked, found: Found
) -> tuple[list[str], dict[str, int | None]]:
    """Transports, and memories with their device: those that both machines have."""
    transports = list(asked.transports) or ["tcp", "tcp-by-nixl", "rdma"]
    lacking = [name for name, told in machines.items() if not _usable_port(told)]
    if "rdma" in transports and lacking and not asked.transports:
        transports.remove("rdma")
        found.left_out["rdma"] = f"no RDMA port can be used on {' and '.join(lacking)}"
    memories: dict[str, int | None] = {"": None}
    if without := [name for name, told in machines.items() if not told["gpus"]]:
        found.left_out["device memory"] = f"no GPU on {' and '.join(without)}"
    else:
        memories["device_"] = 0
    return transports, memories


def _usable_port(machine: dict[str, Any]) -> bool:
    return any("ACTIVE" in port["state"] and port["openable"] for port in machine["rdma_ports"])


def _raw(
    giver: Host,
    taker: Host,
    direction: str,
    asked: Asked,
    transports: Sequence[str],
    found: Found,
    say: Callable[[str], None],
) -> None:
    """What the link itself gives."""

    def attempt(name: str, run: Callable[[], list[float]]) -> None:
        say(f"{giver.name} -> {taker.name}: the link by {name}")
        try:
            found.samples[f"{direction}_link_{name}_gbps"] = run()
        except HostError as error:
            found.left_out[f"{direction}_link_{name}"] = str(error)

    def sockets(count: int) -> list[float]:
        return [socket_rate(giver, taker, count, asked.seconds).gbps for _ in range(asked.rounds)]

    for count in CONNECTIONS:
        attempt(f"sockets_{count}", partial(sockets, count))
    if "tcp-by-nixl" in transports:
        attempt("nixl_tcp", lambda: nixl_rate(giver, taker, "tcp", asked.size_bytes, asked.rounds))
    if "rdma" in transports:
        attempt("nixl_rdma", lambda: nixl_rate(giver, taker, "rdma", asked.size_bytes, asked.rounds))
        attempt("ib_write_bw", lambda: [verbs_rate(giver, taker, asked.seconds) for _ in range(asked.rounds)])

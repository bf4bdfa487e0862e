"""One holder and one receiver on this host: the transfer's rate against the limits of transport and machine."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Literal

import click

from mxbench.fleet import Shape, total_bytes
from mxbench.fleet.certificates import certificates
from mxbench.fleet.fleet import Fleet, Process
from mxbench.results import document, json_option
from mxbench.transfer import limits, registration
from mxbench.transfer.shapes import SHAPES, scaled

MIB = 1 << 20
REGISTERED_TENSORS, REGISTERED_BYTES = 5000, 50 << 10
IDLE_SECONDS = 3.0
RECEIVER = "mxbench.transfer.receiver"
LINK = {"MX_SOURCE_RATE_LIMIT": "1GB"}  # a second: as a network's link would, it leaves cores free
VERIFY_ROUNDS = 9  # at least: what is compared differs by a few percent
MANY_ROUNDS = 9  # of the shape that has a goal
TRANSPORTS: tuple[Literal["tcp", "same-host"], ...] = ("tcp", "same-host")
LIMITS = {"tcp": "socket_1", "same-host": "memcpy"}


@dataclass
class Rates:
    """10^9 bytes a second of one shape, one value a round; `whole` with finding, connecting, registering.

    `limit` is the machine's own: of one socket for TCP, of memcpy within the host.
    """

    moving: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    unverified: list[float] = field(default_factory=list)
    one_descriptor: list[float] = field(default_factory=list)
    one_verified: list[float] = field(default_factory=list)
    limit: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)  # seconds of both processes for 10^9 bytes


class Pair:
    """A worker that serves a model, and one that receives it repeatedly."""

    def __init__(
        self,
        fleet: Fleet,
        transport: str,
        shape: Shape,
        gap_bytes: int,
        source: Mapping[str, str] | None = None,
        both: Mapping[str, str] | None = None,
    ) -> None:
        """`source`: settings of the worker that serves, `both` of both."""
        task = {
            "model": "bench/transfer",
            "content": 5,
            "chunk_bytes": 16 * MIB,
            "strategy": "star",
            "shape": shape,
            "gap_bytes": gap_bytes,
            "tells": False,
        }
        self._bytes = total_bytes(shape)
        self.cpu_seconds_per_gb = 0.0  # of both processes, of the last receive
        self.source = fleet.add(
            {**task, "role": "seed"}, transport=transport, environ={**(both or {}), **(source or {})}
        )
        self.source.expect("serving")
        self._target = fleet.add(
            {**task, "role": "receiver"}, transport=transport, environ=dict(both or {}), module=RECEIVER
        )
        self._target.expect("ready")

    def receive(self, *, verified: bool) -> tuple[float, float]:
        """10^9 bytes a second: while moving, and over all."""
        before = _process_cpu_seconds(self.source)
        self._target.send("verify on" if verified else "verify off")
        self._target.send("start")
        done = self._target.expect("done")
        if not done["right"] or done["path"] != "p2p":
            raise click.ClickException(f"the transfer failed: {done}")
        cpu_seconds = done["cpu_seconds"] + _process_cpu_seconds(self.source) - before
        self.cpu_seconds_per_gb = cpu_seconds / self._bytes * 1e9
        self._target.send("again")
        self._target.expect("ready")
        return self._bytes / done["moving_seconds"] / 1e9, self._bytes / done["receive_seconds"] / 1e9


def verifying(pair: Pair, rates: Rates, number: int) -> None:
    """A round of ours with and without looking at digests; which comes first alternates."""
    for verified in (True, False) if number % 2 else (False, True):
        moving, whole = pair.receive(verified=verified)
        if verified:
            rates.moving.append(moving)
            rates.whole.append(whole)
        else:
            rates.unverified.append(moving)


def behind_a_link(transport: str, shape: Shape, repeats: int) -> Rates:
    """From a source that gives 1 GB/s, so that a core is free on either side: with digests and without."""
    rates = Rates()
    with Fleet() as fleet:
        pair = Pair(fleet, transport, shape, 0, LINK)
        pair.receive(verified=True)
        for number in range(repeats):
            verifying(pair, rates, number)
    return rates


def by_tls(shape: Shape, repeats: int) -> tuple[Rates, Rates]:
    """Over TCP by turns: in clear, and by TLS with certificates on both sides (mTLS)."""
    found = (Rates(), Rates())
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        pairs = [
            Pair(stack.enter_context(Fleet()), "tcp", shape, 0, both=settings)
            for settings in ({}, certificates(folder))
        ]
        for number in range(repeats + 1):
            for pair, rates in zip(pairs, found, strict=True):
                moving, whole = pair.receive(verified=True)
                if number:  # the first one also imports and connects
                    rates.moving.append(moving)
                    rates.whole.append(whole)
                    rates.cpu.append(pair.cpu_seconds_per_gb)
    return found


def measure(transport: Literal["tcp", "same-host"], shape: Shape, gap_bytes: int, repeats: int) -> Rates:
    """Rounds of: the machine's limit, then ours with digests and without between two of one descriptor on one region.

    Then one descriptor with digests. What the machine gives changes within seconds, and so for both alike.
    """
    rates, count = Rates(), total_bytes(shape)
    with limits.OneDescriptor(transport, count) as limit, Fleet() as fleet:
        pair = Pair(fleet, transport, shape, gap_bytes)
        pair.receive(verified=True)  # the first one also imports and connects
        for number in range(repeats):
            rates.limit.append(limits.socket_rate(count, 1) if transport == "tcp" else limits.memcpy_rate(count))
            before = limit.rate()
            verifying(pair, rates, number)
            rates.one_descriptor.append((before + limit.rate()) / 2)
            rates.one_verified.append(limit.rate(verified=True))
    return rates


def idle_worker_share(transport: str, seconds: float) -> float:
    """The share of a core that a worker without readers uses: agent, gRPC services, heartbeat."""
    with Fleet() as fleet:
        source = Pair(fleet, transport, [(8, MIB)], 0).source
        before, started = _cpu_seconds(source), time.monotonic()
        time.sleep(seconds)
        return (_cpu_seconds(source) - before) / (time.monotonic() - started)


def _process_cpu_seconds(process: Process) -> float:
    """Of all its threads, those that have ended too."""
    fields = Path(f"/proc/{process.popen.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _cpu_seconds(process: Process) -> float:
    """Of its threads that live, to the nanosecond."""
    tasks = Path(f"/proc/{process.popen.pid}/task").glob("*/schedstat")
    return sum(int(task.read_text().split()[0]) for task in tasks) / 1e9


def figures_of(
    rates: dict[tuple[str, str], Rates], linked: dict[str, Rates], machine: dict[str, float]
) -> dict[str, Any]:
    """The ratios that the goals are about: the worse of the transports where there is one for each."""

    def over_one(ours: str, one: str, suffix: str = "") -> dict[str, float]:
        """Each shape's rate against that of one descriptor in the same round, the median: fields of Rates."""
        return {
            f"{shape}_vs_one_descriptor{suffix}_{transport.replace('-', '_')}": median(
                a / b for a, b in zip(getattr(found, ours), getattr(found, one), strict=True)
            )
            for (transport, shape), found in rates.items()
        }

    def worse(ratios: dict[str, float]) -> float:
        return min(value for name, value in ratios.items() if name.startswith("many_vs"))

    each = over_one("unverified", "one_descriptor")
    ours_verified = over_one("moving", "one_descriptor", "_ours_verified")
    both_verified = over_one("moving", "one_verified", "_both_verified")
    few = {transport: rates[transport, "few"] for transport in TRANSPORTS}

    def overhead(rate: Rates) -> float:
        return median(rate.unverified) / median(rate.moving) - 1

    return {
        "many_vs_one_descriptor": worse(each),
        "many_vs_one_descriptor_ours_verified": worse(ours_verified),
        "many_vs_one_descriptor_both_verified": worse(both_verified),
        "registration_vs_one_by_one": machine["registration_ratio"],
        "verify_overhead_ratio": max(map(overhead, linked.values())),
        "tcp_vs_raw_socket": median(few["tcp"].moving) / median(few["tcp"].limit),
        "same_host_vs_memcpy": median(few["same-host"].moving) / median(few["same-host"].limit),
        "tls_vs_plain": machine["tls_vs_plain"],
        "tls_vs_plain_by_cpu": machine["tls_vs_plain_by_cpu"],
        "idle_agent_core_share": machine["idle_agent_core_share"],
        **{f"verify_overhead_ratio_cores_busy_{way.replace('-', '_')}": overhead(few[way]) for way in TRANSPORTS},
        **each,
        **ours_verified,
        **both_verified,
    }


def samples_of(rates: dict[tuple[str, str], Rates], linked: dict[str, Rates]) -> dict[str, list[float]]:
    """What each round gave, of the figures that are rates."""
    return {
        **{f"{transport}_{name}_gbps": rate.moving for (transport, name), rate in rates.items()},
        **{f"{transport}_{name}_one_descriptor_gbps": rate.one_descriptor for (transport, name), rate in rates.items()},
        **{f"{way}_behind_a_link_gbps": rate.moving for way, rate in linked.items()},
        **{f"{LIMITS[way]}_gbps": rates[way, "few"].limit for way in TRANSPORTS},
    }


@click.command()
@click.option(
    "--scale",
    type=click.FloatRange(0, min_open=True),
    default=1.0,
    show_default=True,
    help="Of the models: 1 is about 1 GB each.",
)
@click.option("--repeats", type=click.IntRange(1), default=5, show_default=True, help="Rounds; the median counts.")
@json_option
def command(scale: float, repeats: int, as_json: bool) -> None:
    """Transfer between two processes of this host, against one NIXL descriptor, sockets and memcpy in the same run.

    Models: 20,000 tensors of 50 KiB, side by side as an accelerator's allocator places them, and apart as malloc
    does; 8 of 128 MiB; those of Qwen2.5-0.5B. All memory is touched before. What verification adds is measured twice:
    from a source that gives 1 GB/s, as a network's link would, so that a core is free (`verify_overhead_ratio`, the
    worse of the transports), and as fast as both cores can (`_cores_busy`).

    `…_vs_one_descriptor` is without digests on both sides: what many tensors cost. `_ours_verified` is the product as
    it runs against NIXL, which verifies nothing; `_both_verified` has digests of the one descriptor, once it is there.

    `tls_vs_plain` is what is left of the rate by TLS, with certificates on both sides; `_by_cpu` compares the seconds
    that processors worked for it, on both sides, which other load on the machine changes little.
    """
    machine: dict[str, float] = {}
    size = int(1000 * MIB * scale)
    for connections in (2, 4):
        machine[f"socket_{connections}_gbps"] = limits.socket_rate(size, connections)
    machine["digest_gbps"] = limits.digest_rate(size)
    read, hashed = limits.all_cores(size)
    machine["memory_read_all_cores_gbps"], machine["digest_all_cores_gbps"] = median(read), median(hashed)
    machine["digest_all_cores_vs_memory"] = median(b / a for a, b in zip(read, hashed, strict=True))
    registered = registration.measure(REGISTERED_TENSORS, REGISTERED_BYTES)
    machine["registration_ratio"] = registered.single_seconds / registered.merged_seconds
    machine["idle_agent_core_share"] = limits.idle_agent_share(IDLE_SECONDS)
    machine["idle_worker_core_share"] = idle_worker_share("tcp", IDLE_SECONDS)
    rates: dict[tuple[str, str], Rates] = {}
    for transport in TRANSPORTS:
        for name, (shape, gap_bytes) in SHAPES.items():
            rounds = max(repeats, MANY_ROUNDS) if name == "many" else repeats
            found = rates[transport, name] = measure(transport, scaled(shape, scale), gap_bytes, rounds)
            click.echo(
                f"{transport}, {name}: {median(found.moving):.2f} GB/s ({median(found.whole):.2f} with finding and "
                f"connecting), {median(found.unverified):.2f} unverified, one descriptor "
                f"{median(found.one_descriptor):.2f} ({median(found.one_verified):.2f} verified), {LIMITS[transport]} "
                f"{median(found.limit):.2f}",
                err=True,
            )
    few = scaled(SHAPES["few"][0], scale)
    in_clear, encrypted = by_tls(few, repeats)
    machine["tls_vs_plain"] = median(encrypted.moving) / median(in_clear.moving)
    machine["tls_vs_plain_by_cpu"] = median(in_clear.cpu) / median(encrypted.cpu)
    machine["tls_cpu_seconds_per_gb"], machine["plain_cpu_seconds_per_gb"] = median(encrypted.cpu), median(in_clear.cpu)
    machine["tls_gbps"], machine["tls_plain_gbps"] = median(encrypted.moving), median(in_clear.moving)
    linked: dict[str, Rates] = {way: behind_a_link(way, few, max(repeats, VERIFY_ROUNDS)) for way in TRANSPORTS}
    figures = {name: round(value, 4) for name, value in figures_of(rates, linked, machine).items()}
    details = {
        **{name: round(value, 4) for name, value in machine.items() if name not in figures},
        "registered_seconds_merged": round(registered.merged_seconds, 6),
        "registered_seconds_one_by_one": round(registered.single_seconds, 6),
        "metadata_bytes_merged": registered.merged_metadata_bytes,
        "metadata_bytes_one_by_one": registered.single_metadata_bytes,
        **{f"{transport}_{name}_gbps": round(median(rate.moving), 3) for (transport, name), rate in rates.items()},
        **{
            f"{transport}_{name}_one_descriptor_gbps": round(median(rate.one_descriptor), 3)
            for (transport, name), rate in rates.items()
        },
        **{f"{way}_behind_a_link_gbps": round(median(rate.moving), 3) for way, rate in linked.items()},
        **{f"{LIMITS[way]}_gbps": round(median(rates[way, "few"].limit), 3) for way in TRANSPORTS},
    }
    if as_json:
        asked = {"scale": scale, "repeats": repeats}
        told = document("transfer", {**figures, **details}, settings=asked, samples=samples_of(rates, linked))
        json.dump(told, sys.stdout)
        sys.stdout.write("\n")
    else:
        for name, value in {**figures, **details}.items():
            click.echo(f"{name:40} {value}")


if __name__ == "__main__":
    command()

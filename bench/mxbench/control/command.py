"""`mx bench control`: the server under a start-up storm and under heartbeats, by real processes over real sockets.

Servers run on one core (with Redis, which shares it), simulated workers on the others. Each worker has a connection
of its own. In the storm, so many workers at once join, list, get one record, publish and become ready, as fast as
they are answered: the rate is what one core sustains. Then all of them send heartbeats every 30 s.

At last each hostile client of `make test-adversary` is at a server of its own, which has all cores, with honest
workers beside it: `adversary_p99_seconds` is the worst 99th percentile of a heartbeat or listing, during an attack and
after it, and `adversary_machine_p99_seconds` that of a call to a server of a few lines which nobody attacks.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import click

from mxbench.needs import why_no_tests
from mxbench.results import document, json_option

CALLS_PER_WORKER = 5


@click.command("control")
@click.option("--workers", type=click.IntRange(1), default=10_000, show_default=True, help="Workers that start.")
@click.option(
    "--at-once", type=click.IntRange(1), default=64, show_default=True, help="Workers that are starting at any moment."
)
@click.option("--fleet-workers", type=click.IntRange(1), default=200, show_default=True, help="Workers of one model.")
@click.option("--ranks", type=click.IntRange(1), default=8, show_default=True, help="Ranks that a model is split over.")
@click.option(
    "--idle-seconds",
    type=click.FloatRange(0, min_open=True),
    default=30.0,
    show_default=True,
    help="How long heartbeats are measured.",
)
@click.option(
    "--heartbeat-seconds",
    type=click.FloatRange(0, min_open=True),
    default=30.0,
    show_default=True,
    help="Between two heartbeats of a worker.",
)
@click.option("--store", type=click.Choice(["sqlite", "redis", "memory"]), default="sqlite", show_default=True)
@click.option("--replicas", type=click.IntRange(1), help="Servers (default: 2 over Redis, otherwise 1).")
@click.option(
    "--processes", type=click.IntRange(1), default=4, show_default=True, help="Processes of simulated workers."
)
@click.option(
    "--attack-seconds",
    type=click.FloatRange(0),
    default=10.0,
    show_default=True,
    help="Of each hostile client; 0: none.",
)
@click.option("--folder", type=click.Path(exists=True, file_okay=False, path_type=Path), help="On the disk to measure.")
@click.option("--table", is_flag=True, help="A row of the capacity table in docs/how-to/run-a-server.md.")
@json_option
def command(
    workers: int,
    at_once: int,
    fleet_workers: int,
    ranks: int,
    idle_seconds: float,
    heartbeat_seconds: float,
    store: str,
    replicas: int | None,
    processes: int,
    attack_seconds: float,
    folder: Path | None,
    table: bool,
    as_json: bool,
) -> None:
    """A start-up storm of workers, then their heartbeats, against a server on one core; then hostile clients."""
    replicas = replicas or (2 if store == "redis" else 1)
    if replicas > 1 and store != "redis":
        raise click.UsageError("only servers over Redis share their state; give --store redis")
    shape = {"fleet_workers": fleet_workers, "ranks": ranks, "at_once": max(1, at_once // processes)}
    with tempfile.TemporaryDirectory(prefix="mx-bench-", dir=folder) as place, ExitStack() as stack:
        result = _measure(
            stack, Path(place), store, replicas, processes, workers, shape, (idle_seconds, heartbeat_seconds)
        )
    if attack_seconds and (why := why_no_tests()):
        result["left_out"] = {"hostile clients": why}
        click.echo(f"left out: hostile clients: {why}", err=True)
    elif attack_seconds:
        from mxbench.control.adversary import attacks_on

        with tempfile.TemporaryDirectory(prefix="mx-bench-", dir=folder) as place:
            attacks = attacks_on(Path(place), store, attack_seconds)
        result["attacks"] = [attack._asdict() for attack in attacks]
        result["figures"] |= {
            "adversary_p99_seconds": round(max(attack.p99_seconds for attack in attacks), 4),
            "adversary_machine_p99_seconds": round(max(attack.machine_p99_seconds for attack in attacks), 4),
            "adversary_rss_mib": round(max(attack.rss_mib for attack in attacks), 1),
            "adversary_failures": sum(len(attack.failures) for attack in attacks),
        }
    if as_json:
        asked = {**click.get_current_context().params, "folder": str(folder or ""), "replicas": replicas}
        figures = result.pop("figures")
        click.echo(json.dumps(document(result.pop("bench"), figures, settings=asked, **result)))
        return
    if table:
        click.echo("\n".join((*CAPACITY_HEAD, capacity_row(result))))
        return
    for name, value in result["figures"].items():
        click.echo(f"{name:28} {value:g}")
    for reason, count in result["errors"].items():
        click.echo(f"  {count} times: {reason}")


def _measure(
    stack: ExitStack,
    place: Path,
    store: str,
    replicas: int,
    processes: int,
    workers: int,
    shape: dict[str, int],
    idle: tuple[float, float],
) -> dict[str, Any]:
    cores = sorted(os.sched_getaffinity(0))
    fleet = _Fleet(stack, place, cores, store, replicas, processes)
    empty_mib = fleet.rss_mib()
    cuts = [workers * number // processes for number in range(processes + 1)]
    storm = fleet.measured(
        {"do": "storm", "task": {"addresses": fleet.addresses, "first": first, "count": end - first, **shape}}
        for first, end in itertools.pairwise(cuts)
    )
    rest = fleet.measured({"do": "idle", "seconds": idle[0], "interval_seconds": idle[1]} for _ in range(processes))
    figures = {
        "storm_workers": workers,
        "storm_errors": sum(storm.errors.values()) + workers * CALLS_PER_WORKER - len(storm.calls),
        "storm_p50_seconds": _quantile(storm.calls, 0.5),
        "storm_p99_seconds": _quantile(storm.calls, 0.99),
        "storm_max_seconds": _quantile(storm.calls, 1.0),
        "storm_seconds": storm.seconds,
        "storm_calls_per_second": len(storm.calls) / storm.seconds,
        "storm_core_share": storm.cpu_seconds / storm.seconds,
        "storm_calls_per_core_second": len(storm.calls) / storm.cpu_seconds,
        "idle_errors": sum(rest.errors.values()),
        "idle_calls_per_second": len(rest.calls) / rest.seconds,
        "idle_p99_seconds": _quantile(rest.calls, 0.99),
        "idle_core_share": rest.cpu_seconds / rest.seconds,
        "idle_redis_core_share": rest.redis_cpu_seconds / rest.seconds,
        "idle_workers_per_core": workers * rest.seconds / rest.cpu_seconds if rest.cpu_seconds else 0.0,
        "storm_workers_per_core_second": len(storm.calls) / CALLS_PER_WORKER / storm.cpu_seconds,
        "empty_mib": empty_mib,
        "mib_per_1000_workers": 1000 * (fleet.rss_mib() - empty_mib) / workers,
    }
    return {
        "bench": "control",
        "store": store,
        "replicas": replicas,
        "cores": len(cores),
        "load_average": os.getloadavg(),
        "shape": shape,
        "errors": storm.errors | rest.errors,
        "figures": {name: round(value, 4) for name, value in figures.items()},
    }


CAPACITY_HEAD = (
    "| store | servers | workers | start: workers a core and second | at rest: workers a core | MiB, empty "
    "| MiB for 1,000 workers | heartbeat, 99 % (s) |",
    "|---|---|---|---|---|---|---|---|",
)


def capacity_row(result: dict[str, Any]) -> str:
    """A row of the capacity table: what one core of servers (with their Redis) does, and the memory of all of them."""
    figures = result["figures"]
    return (
        f"| {result['store']} | {result['replicas']} | {figures['storm_workers']:,} "
        f"| {figures['storm_workers_per_core_second']:,.0f} | {figures['idle_workers_per_core']:,.0f} "
        f"| {figures['empty_mib']:.0f} | {figures['mib_per_1000_workers']:.1f} | {figures['idle_p99_seconds']:.3f} |"
    )


class _Phase(NamedTuple):
    """The cost of one task of all clients: sorted seconds of the calls, and seconds of the servers' CPU."""

    calls: list[float]
    errors: dict[str, int]
    seconds: float
    cpu_seconds: float  # Redis' included
    redis_cpu_seconds: float


class _Fleet:
    """Servers (and their Redis) on the first core, processes of simulated workers on the others; `stack` ends them."""

    def __init__(
        self, stack: ExitStack, place: Path, cores: list[int], store: str, replicas: int, processes: int
    ) -> None:
        from mxbench.control.processes import Clients, Redis, Server

        arguments = ["--store", store, "--store-path", str(place / "state.sqlite3")]
        self._redis_pids = []
        if store == "redis":
            redis = Redis(place, cores[0])
            stack.callback(redis.stop)
            self._redis_pids.append(redis.process.pid)
            arguments += ["--redis-url", redis.url]
        servers = []
        for number in range(replicas):
            servers.append(Server(place, number, arguments, cores[0]))
            stack.callback(servers[-1].stop)
        self._server_pids = [server.process.pid for server in servers]
        self.addresses = [server.address for server in servers]
        self._clients = []
        for _ in range(processes):
            self._clients.append(Clients(set(cores[1:] or cores)))
            stack.callback(self._clients[-1].stop)

    def measured(self, tasks: Iterable[dict[str, Any]]) -> _Phase:
        """One task for each client, at once; returns when all have answered."""
        started, (used, redis_used) = time.monotonic(), self._cpu_seconds()
        for client, task in zip(self._clients, tasks, strict=True):
            client.send(**task)
        calls: list[float] = []
        errors: Counter[str] = Counter()
        for client in self._clients:
            answer = client.read()
            calls += answer["seconds"]
            errors.update(answer["errors"])
        seconds, (used_after, redis_after) = time.monotonic() - started, self._cpu_seconds()
        return _Phase(sorted(calls), dict(errors), seconds, used_after - used, redis_after - redis_used)

    def rss_mib(self) -> float:
        """The memory of all servers and their Redis, resident."""
        from mxbench.control.processes import resident_mib

        return sum(resident_mib(pid) for pid in (*self._server_pids, *self._redis_pids))

    def _cpu_seconds(self) -> tuple[float, float]:
        """The CPU seconds so far of all servers, and Redis' part of them."""
        from mxbench.control.processes import cpu_seconds

        of_redis = sum(cpu_seconds(pid) for pid in self._redis_pids)
        return sum(cpu_seconds(pid) for pid in self._server_pids) + of_redis, of_redis


def _quantile(values: list[float], share: float) -> float:
    return values[min(len(values) - 1, int(len(values) * share))] if values else 0.0


if __name__ == "__main__":
    sys.exit(command())

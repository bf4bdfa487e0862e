"""`mx bench control`: the server under a start-up storm and under heartbeats, by real processes over real sockets.

Servers run on one core (with Redis, which shares it), simulated workers on the others. Each worker has a connection
of its own. In the storm, so many workers at once join, list, get one record, publish and become ready, as fast as
they are answered: the rate is what one core sustains. Then all of them send heartbeats every 30 s.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click

CALLS_PER_WORKER = 5


@click.command("control")
@click.option("--workers", default=10_000, show_default=True, help="Workers that start.")
@click.option("--at-once", default=64, show_default=True, help="Workers that are starting at any moment.")
@click.option("--fleet-workers", default=200, show_default=True, help="Workers of one model.")
@click.option("--ranks", default=8, show_default=True, help="Ranks that a model is split over.")
@click.option("--idle-seconds", default=30.0, show_default=True, help="How long heartbeats are measured.")
@click.option("--heartbeat-seconds", default=30.0, show_default=True, help="Between two heartbeats of a worker.")
@click.option("--store", type=click.Choice(["sqlite", "redis", "memory"]), default="sqlite", show_default=True)
@click.option("--replicas", type=int, help="Servers (default: 2 over Redis, otherwise 1).")
@click.option("--processes", default=4, show_default=True, help="Processes of simulated workers.")
@click.option("--folder", type=click.Path(file_okay=False, path_type=Path), help="On the disk to measure.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
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
    folder: Path | None,
    as_json: bool,
) -> None:
    """A start-up storm of workers, then their heartbeats, on one core's server."""
    replicas = replicas or (2 if store == "redis" else 1)
    if replicas > 1 and store != "redis":
        raise click.UsageError("only servers over Redis share their state; give --store redis")
    shape = {"fleet_workers": fleet_workers, "ranks": ranks, "at_once": max(1, at_once // processes)}
    with tempfile.TemporaryDirectory(prefix="mx-bench-", dir=folder) as place, ExitStack() as stack:
        result = _measure(
            stack, Path(place), store, replicas, processes, workers, shape, (idle_seconds, heartbeat_seconds)
        )
    if as_json:
        click.echo(json.dumps(result))
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
    from bench.control.processes import Clients, Redis, Server, cpu_seconds

    cores = sorted(os.sched_getaffinity(0))
    server_core, client_cores = cores[0], set(cores[1:] or cores)
    arguments = ["--store", store, "--store-path", str(place / "state.sqlite3")]
    redis_pids = []
    if store == "redis":
        redis = Redis(place, server_core)
        stack.callback(redis.stop)
        redis_pids.append(redis.process.pid)
        arguments += ["--redis-url", redis.url]
    servers = [Server(place, number, arguments, server_core) for number in range(replicas)]
    for server in servers:
        stack.callback(server.stop)
    clients = [Clients(client_cores) for _ in range(processes)]
    for client in clients:
        stack.callback(client.stop)
    server_pids = [server.process.pid for server in servers]

    def used() -> tuple[float, float]:
        """CPU seconds so far, of all and of Redis among them."""
        of_redis = sum(cpu_seconds(pid) for pid in redis_pids)
        return sum(cpu_seconds(pid) for pid in server_pids) + of_redis, of_redis

    def all_answers() -> tuple[list[float], dict[str, int]]:
        seconds: list[float] = []
        errors: dict[str, int] = {}
        for client in clients:
            answer = client.read()
            seconds += answer["seconds"]
            for reason, count in answer["errors"].items():
                errors[reason] = errors.get(reason, 0) + count
        return sorted(seconds), errors

    addresses = [server.address for server in servers]
    cuts = [workers * number // processes for number in range(processes + 1)]
    started, (used_before, _) = time.monotonic(), used()
    for client, first, end in zip(clients, cuts, cuts[1:], strict=False):
        client.send(do="storm", task={"addresses": addresses, "first": first, "count": end - first, **shape})
    storm_calls, storm_errors = all_answers()
    storm_seconds, storm_used = time.monotonic() - started, used()[0] - used_before
    started, (used_before, redis_before) = time.monotonic(), used()
    for client in clients:
        client.send(do="idle", seconds=idle[0], interval_seconds=idle[1])
    idle_calls, idle_errors = all_answers()
    idle_wall, (used_after, redis_after) = time.monotonic() - started, used()
    figures = {
        "storm_workers": workers,
        "storm_errors": sum(storm_errors.values()) + workers * CALLS_PER_WORKER - len(storm_calls),
        "storm_p50_seconds": _quantile(storm_calls, 0.5),
        "storm_p99_seconds": _quantile(storm_calls, 0.99),
        "storm_max_seconds": storm_calls[-1],
        "storm_seconds": storm_seconds,
        "storm_calls_per_second": len(storm_calls) / storm_seconds,
        "storm_core_share": storm_used / storm_seconds,
        "storm_calls_per_core_second": len(storm_calls) / storm_used,
        "idle_errors": sum(idle_errors.values()),
        "idle_calls_per_second": len(idle_calls) / idle_wall,
        "idle_p99_seconds": _quantile(idle_calls, 0.99),
        "idle_core_share": (used_after - used_before) / idle_wall,
        "idle_redis_core_share": (redis_after - redis_before) / idle_wall,
    }
    return {
        "bench": "control",
        "store": store,
        "replicas": replicas,
        "cores": len(cores),
        "load_average": os.getloadavg(),
        "shape": shape,
        "errors": storm_errors | idle_errors,
        "figures": {name: round(value, 4) for name, value in figures.items()},
    }


def _quantile(values: list[float], share: float) -> float:
    return values[min(len(values) - 1, int(len(values) * share))] if values else 0.0


if __name__ == "__main__":
    sys.exit(command())

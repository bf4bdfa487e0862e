"""`mx bench storm`: the control path of a fleet that starts at once, by real servers over real sockets.

Ranks start within ten seconds. One of each rank reads storage, the others wait on their streams, then receive by
turns; one in a hundred dies. Servers run on one core (with Redis, which shares it), the ranks on the others. The bytes
are left out: reading and receiving are time that passes.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click

SETTLE_SECONDS = 3.0


@click.command("storm")
@click.option(
    "--ranks",
    "count",
    type=click.IntRange(1),
    default=400,
    show_default=True,
    help="Workers that start, one a rank and host.",
)
@click.option(
    "--ranks-per-host", type=click.IntRange(1), default=8, show_default=True, help="Ranks that the model is split over."
)
@click.option(
    "--start-seconds",
    type=click.FloatRange(0, min_open=True),
    default=10.0,
    show_default=True,
    help="In which all have started.",
)
@click.option(
    "--read-seconds",
    type=click.FloatRange(0, min_open=True),
    default=60.0,
    show_default=True,
    help="How long reading storage takes.",
)
@click.option(
    "--receive-seconds",
    type=click.FloatRange(0, min_open=True),
    default=20.0,
    show_default=True,
    help="How long receiving takes.",
)
@click.option(
    "--at-once", type=click.IntRange(0), default=0, show_default=True, help="How many receive at once; 0: half of them."
)
@click.option(
    "--heartbeat-seconds",
    type=click.FloatRange(0, min_open=True),
    default=30.0,
    show_default=True,
    help="Between two heartbeats of a worker.",
)
@click.option("--store", type=click.Choice(["sqlite", "redis", "memory"]), default="sqlite", show_default=True)
@click.option("--processes", type=click.IntRange(1), default=4, show_default=True, help="Processes of ranks.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def command(store: str, as_json: bool, **shape: Any) -> None:
    """A fleet that starts at once: what waiting, turns and news cost the server, and when workers hear."""
    with tempfile.TemporaryDirectory(prefix="mx-bench-") as place, ExitStack() as stack:
        result = _measure(stack, Path(place), store, shape)
    if as_json:
        from mxbench.results import document

        figures = result.pop("figures")
        click.echo(json.dumps(document(result.pop("bench"), figures, settings={"store": store, **shape}, **result)))
        return
    for name, value in result["figures"].items():
        click.echo(f"{name:32} {value:g}")
    for reason, times in result["errors"].items():
        click.echo(f"  {times} times: {reason}")


def _measure(stack: ExitStack, place: Path, store: str, shape: dict[str, Any]) -> dict[str, Any]:
    from bench.control.processes import ROOT, Redis, Server, cpu_seconds

    cores = sorted(os.sched_getaffinity(0))
    arguments = ["--store", store, "--store-path", str(place / "state.sqlite3")]
    pids = []
    if store == "redis":
        redis = Redis(place, cores[0])
        stack.callback(redis.stop)
        pids.append(redis.process.pid)
        arguments += ["--redis-url", redis.url]
    servers = []
    for number in range(2 if store == "redis" else 1):
        servers.append(Server(place, number, arguments, cores[0]))
        stack.callback(servers[-1].stop)
    pids += [server.process.pid for server in servers]
    count, processes = shape["count"], shape["processes"]
    at_once = shape["at_once"] or count // 2
    rounds = -(-count // at_once)
    end_seconds = shape["start_seconds"] + shape["read_seconds"] + rounds * shape["receive_seconds"] * 1.5 + 60
    children = []
    for _ in range(processes):
        child = subprocess.Popen(
            [sys.executable, "-m", "bench.storm.ranks"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        stack.callback(_end, child)
        os.sched_setaffinity(child.pid, set(cores[1:] or cores))
        children.append(child)
    began = time.monotonic() + 3.0
    for position, child in enumerate(children):
        task = {
            "addresses": [server.address for server in servers],
            "numbers": list(range(position, count, processes)),
            "ranks": shape["ranks_per_host"],
            "began": began,
            "at_once": max(1, at_once // processes),
            "dying": count // 100,
            "end_seconds": end_seconds,
            **{name: shape[name] for name in ("start_seconds", "read_seconds", "receive_seconds", "heartbeat_seconds")},
        }
        assert child.stdin is not None
        child.stdin.write(json.dumps(task) + "\n")
        child.stdin.flush()
    time.sleep(max(0.0, began + shape["start_seconds"] + SETTLE_SECONDS - time.monotonic()))
    waited_from, used = time.monotonic(), sum(map(cpu_seconds, pids))
    time.sleep(max(1.0, began + shape["read_seconds"] - 1.0 - time.monotonic()))
    waiting_share = (sum(map(cpu_seconds, pids)) - used) / (time.monotonic() - waited_from)
    answers = [json.loads(child.stdout.readline()) for child in children if child.stdout is not None]
    stale = _stale(servers[0].address, {tuple(pair) for answer in answers for pair in answer["live"]})
    return {
        "bench": "storm",
        "store": store,
        "shape": shape,
        "cores": len(cores),
        "load_average": os.getloadavg(),
        "errors": sum((Counter(answer["errors"]) for answer in answers), Counter()),
        "figures": {name: round(value, 4) for name, value in _figures(count, waiting_share, answers, stale).items()},
    }


def _figures(count: int, waiting_share: float, answers: list[dict[str, Any]], stale: int) -> dict[str, float]:
    ready: dict[int, float] = {}
    for answer in answers:
        for rank, at in answer["ready"]:
            ready[rank] = min(at, ready.get(rank, at))
    notices = sorted(at - ready[rank] for answer in answers for rank, at in answer["noticed"] if rank in ready)
    calls = sorted(
        s for a in answers for name in ("UpdateStatus", "PublishMetadata") for s in a["call_seconds"].get(name, ())
    )
    reads = sorted(tuple(read) for answer in answers for read in answer["read"])
    twice = sum(a[0] == b[0] and b[1] < a[2] for a, b in itertools.pairwise(reads))
    loading = sum(answer["loading_seconds"] for answer in answers)
    return {
        "ranks": count,
        "server_core_share_waiting": waiting_share,
        "notice_p99_seconds": _quantile(notices, 0.99),
        "notices": len(notices),
        "calls_per_rank_second_loading": sum(a["loading_calls"] for a in answers) / loading if loading else 0.0,
        "turns_given_twice": twice,
        "readers_of_storage": len(reads),
        "calls": sum(len(seconds) for a in answers for seconds in a["call_seconds"].values()),
        "p99_seconds": _quantile(calls, 0.99),
        "errors": sum(sum(answer["errors"].values()) for answer in answers),
        "stale_live_workers": stale,
    }


def _stale(address: str, live: set[tuple[str, ...]]) -> int:
    """How many workers that live are not READY at the server."""
    from mxserver.wire.calls import ServerClient
    from mxserver.wire.proto import p2p_pb2

    with ServerClient(address) as client:
        ready = {(ref.mx_source_id, ref.worker_id) for ref in client.list_sources(status=p2p_pb2.SOURCE_STATUS_READY)}
    return len(live - ready)


def _end(child: subprocess.Popen[str]) -> None:
    for stream in (child.stdin, child.stdout):
        assert stream is not None
        stream.close()
    try:
        child.wait(20)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def _quantile(values: list[float], share: float) -> float:
    return values[min(len(values) - 1, int(len(values) * share))] if values else 0.0


if __name__ == "__main__":
    sys.exit(command())

"""`mx bench storm`: the control path of a fleet that starts at once, by real servers over real sockets.

Ranks start within ten seconds. One of each rank reads storage, the others wait on their streams, then receive by turns,
some are refused; one in a hundred dies. Servers run on one core (with Redis, which shares it), the ranks on the others.
Of most ranks the bytes are left out: reading and receiving are time that passes. A few are whole workers, which really
transfer. Once over SQLite, once by two replicas over Redis; a figure is the worse of both.
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

from mxbench.results import document, json_option

SETTLE_SECONDS = 3.0
LEAD_SECONDS = 5.0  # processes of ranks import and make their clients
SLACK_SECONDS = 10.0
REFUSED = 192


@click.command("storm")
@click.option(
    "--ranks",
    "count",
    type=click.IntRange(1),
    default=1600,
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
    default=40.0,
    show_default=True,
    help="How long receiving takes, about.",
)
@click.option(
    "--heartbeat-seconds",
    type=click.FloatRange(0, min_open=True),
    default=30.0,
    show_default=True,
    help="Between two heartbeats of a worker.",
)
@click.option(
    "--whole", type=click.IntRange(2), default=16, show_default=True, help="Of all, those that really transfer."
)
@click.option(
    "--megabytes", type=click.IntRange(1), default=32, show_default=True, help="Model of the whole workers, MiB."
)
@click.option("--store", type=click.Choice(["both", "sqlite", "redis", "memory"]), default="both", show_default=True)
@click.option(
    "--processes",
    type=click.IntRange(1),
    default=4,
    show_default=True,
    help="Processes of ranks, a divisor of the ranks per host.",
)
@click.option("--refusing/--no-refusing", default=True, show_default=True, help="Measure a holder that refuses, too.")
@json_option
def command(store: str, as_json: bool, refusing: bool, **shape: Any) -> None:
    """A fleet that starts at once: what waiting, turns and news cost the server, and when workers hear."""
    runs = {}
    for name in ("sqlite", "redis") if store == "both" else (store,):
        with tempfile.TemporaryDirectory(prefix="mx-bench-") as place, ExitStack() as stack:
            runs[name] = _measure(stack, Path(place), name, shape)
        click.echo(f"{name}: {json.dumps(runs[name]['figures'])}", err=True)
    figures = worse(runs)
    if refusing:
        from mxbench.storm.refusing import measured

        found = measured(REFUSED)
        figures |= {
            f"holder_core_share_refusing_{REFUSED}": round(found.core_share, 4),
            "holder_core_share_idle": round(found.idle_core_share, 4),
            "holder_refusals": found.refusals,
        }
        figures["errors"] += found.failed
    result: dict[str, Any] = {"shape": shape, "cores": len(os.sched_getaffinity(0)), "runs": runs}
    if as_json:
        click.echo(json.dumps(document("storm", figures, settings={"store": store, **shape}, **result)))
        return
    for name, value in figures.items():
        click.echo(f"{name:32} {value:g}")
    for name, run in runs.items():
        for reason, times in run["errors"].items():
            click.echo(f"  {name}, {times} times: {reason}")


def worse(runs: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Of each figure the worse one: less ranks, more of all else."""
    each = [run["figures"] for run in runs.values()]
    found = {name: max(figures[name] for figures in each) for name in each[0]}
    fewer = ("ranks", "notices", "whole_from_peers", "whole_right", "refused", "whole_refused", "died")
    return found | {name: min(figures[name] for figures in each) for name in fewer}


def _measure(stack: ExitStack, place: Path, store: str, shape: dict[str, Any]) -> dict[str, Any]:
    from mxbench.control.processes import Redis, Server, cpu_seconds
    from mxbench.storm.core_shares import CoreShares

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
    children = _Children(set(cores[1:] or cores))
    stack.callback(children.end)
    began = time.monotonic() + LEAD_SECONDS
    _start(children, [server.address for server in servers], shape, began)
    shares = stack.enter_context(CoreShares(began, servers=pids, ranks=children.pids))
    time.sleep(max(0.0, began + shape["start_seconds"] + SETTLE_SECONDS - time.monotonic()))
    waited_from, used = time.monotonic(), sum(map(cpu_seconds, pids))
    time.sleep(max(1.0, began + shape["read_seconds"] - 1.0 - time.monotonic()))
    waiting_share = (sum(map(cpu_seconds, pids)) - used) / (time.monotonic() - waited_from)
    *answers, whole = [json.loads(line) for line in children.lines()]
    seconds = time.monotonic() - began
    told = list(shares.found)
    live = {tuple(pair) for answer in (*answers, whole) for pair in answer["live"]}
    stale = _stale(servers[0].address, live)
    figures = _figures(shape["count"], waiting_share, answers, whole, stale)
    calls: Counter[str] = Counter()
    for answer in answers:
        calls.update({name: len(each) for name, each in answer["call_seconds"].items()})
    loading = sum((Counter(answer["loading_calls"]) for answer in answers), Counter())
    outcomes = Counter(outcome for outcome in whole["outcomes"] if outcome not in ("storage", "peers"))
    return {
        "seconds": round(seconds, 1),
        "load_average": os.getloadavg(),
        "calls": dict(calls),
        "loading_calls": dict(loading),
        "core_shares": told,
        "slow_calls": _by_time(began, answers),
        "errors": dict(sum((Counter(answer["errors"]) for answer in answers), outcomes)),
        "figures": {name: round(value, 4) for name, value in figures.items()},
    }


class _Children:
    """Processes of ranks, on these cores."""

    def __init__(self, cores: set[int]) -> None:
        self._cores = cores
        self._processes: list[subprocess.Popen[str]] = []

    @property
    def pids(self) -> list[int]:
        """Of those that were started."""
        return [child.pid for child in self._processes]

    def start(self, module: str, task: dict[str, Any]) -> None:

        command = [sys.executable, "-m", module]
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._processes.append(child)
        os.sched_setaffinity(child.pid, self._cores)
        assert child.stdin is not None
        child.stdin.write(json.dumps(task) + "\n")
        child.stdin.flush()

    def lines(self) -> list[str]:
        """What each of them answers, once it does."""
        found = []
        for child in self._processes:
            assert child.stdout is not None
            found.append(child.stdout.readline())
            if not found[-1]:
                raise click.ClickException(f"a process of ranks ended with {child.wait()}")
        return found

    def end(self) -> None:
        for child in self._processes:
            assert child.stdin is not None
            child.stdin.close()
        for child in self._processes:
            try:
                child.wait(20)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
            assert child.stdout is not None
            child.stdout.close()


def _start(children: _Children, addresses: list[str], shape: dict[str, Any], began: float) -> None:
    simulated, processes = shape["count"] - shape["whole"], shape["processes"]
    times = {name: shape[name] for name in ("start_seconds", "read_seconds", "heartbeat_seconds")}
    end_seconds = shape["start_seconds"] + 2 * shape["read_seconds"] + 3 * shape["receive_seconds"] + SLACK_SECONDS
    common = {"addresses": addresses, "began": began, "end_seconds": end_seconds, **times}
    for position in range(processes):
        numbers = list(range(position, simulated, processes))
        task = {"numbers": numbers, "ranks": shape["ranks_per_host"], "dying": shape["count"] // 100}
        children.start("mxbench.storm.ranks", {**common, **task, "receive_seconds": shape["receive_seconds"]})
    whole = {"count": shape["whole"], "model_bytes": shape["megabytes"] << 20}
    children.start("mxbench.storm.whole", {**common, **whole})


def _figures(
    count: int, waiting_share: float, answers: list[dict[str, Any]], whole: dict[str, Any], stale: int
) -> dict[str, float]:
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
    loading_calls = sum(sum(answer["loading_calls"].values()) for answer in answers)
    outcomes = Counter(whole["outcomes"])
    right = outcomes["peers"] + outcomes["storage"]
    return {
        "ranks": count,
        "server_core_share_waiting": waiting_share,
        "notice_p99_seconds": _quantile(notices, 0.99),
        "calls_per_rank_second_loading": loading_calls / loading if loading else 0.0,
        "turns_given_twice": twice + max(0, outcomes["storage"] - 1),
        "p99_seconds": _quantile(calls, 0.99),
        "errors": sum(sum(answer["errors"].values()) for answer in answers) + len(whole["outcomes"]) - right,
        "stale_live_workers": stale,
        "notices": len(notices),
        "readers_of_storage": len(reads) + outcomes["storage"],
        "refused": sum(answer["refused"] for answer in answers),
        "died": sum(answer["died"] for answer in answers),
        "whole_right": right,
        "whole_from_peers": outcomes["peers"],
        "whole_refused": whole["refused"],
    }


def _by_time(began: float, answers: list[dict[str, Any]]) -> dict[str, int]:
    """How many calls were slow in each ten seconds, by name."""
    slow = sorted((int((at - began) // 10), name) for answer in answers for at, name, _ in answer["slow_calls"])
    return {f"{10 * tens} s, {name}": times for (tens, name), times in Counter(slow).items()}


def _stale(address: str, live: set[tuple[str, ...]]) -> int:
    """How many workers that live are not READY at the server."""
    from mxserver.wire.calls import ServerClient
    from mxserver.wire.proto import p2p_pb2

    with ServerClient(address) as client:
        ready = {(ref.mx_source_id, ref.worker_id) for ref in client.list_sources(status=p2p_pb2.SOURCE_STATUS_READY)}
    return len(live - ready)


def _quantile(values: list[float], share: float) -> float:
    return values[min(len(values) - 1, int(len(values) * share))] if values else 0.0


if __name__ == "__main__":
    sys.exit(command())

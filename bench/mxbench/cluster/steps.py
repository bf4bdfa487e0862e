"""The steps of a cluster's bench. Each takes a connected cluster and makes what its document has; raises HostError."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median
from typing import Any, NamedTuple

from mxbench.cluster.cluster import Cluster
from mxbench.fleet import total_bytes
from mxbench.hosts import Child, Host, HostError
from mxbench.link import socket_rate

__all__ = ["STRATEGIES", "Step", "steps_of", "tournament"]

STRATEGIES = ("swarm", "doubling", "star")
_READERS = {"swarm": 8, "doubling": 1}
_LONG_SECONDS = 1e9  # the step's own deadline is sooner

Made = dict[str, Any]
"""`figures`, and what else the document has: `pairs`, `progress`, `fan_out`."""


class Step(NamedTuple):
    """A name, which is its file's, and what it does."""

    name: str
    run: Callable[[Cluster], Made]


def steps_of(hosts: int, strategies: Sequence[str]) -> list[Step]:
    """All steps for so many machines: fan-out to 1, 2, 4, … and all others."""
    counts = sorted({2**power for power in range(32) if 2**power < hosts} | {hosts - 1})
    steps = [Step("machines", machines), Step("pairs", pairs)]
    for count in counts:
        for strategy in strategies if count > 1 else ("swarm",):
            steps.append(Step(f"fan-out-{strategy}-{count}", _fan_out_to(strategy, count)))
    steps += [Step("storage", storage), Step("update", update)]
    if hosts > 2:
        steps.append(Step("killed", killed))
    return steps


def machines(cluster: Cluster) -> Made:
    """What each machine is."""
    told = cluster.at_once(lambda host: host.machine(), cluster.hosts)
    return {
        "figures": {"machines": len(told)},
        "hosts": {host.name: found for host, found in zip(cluster.hosts, told, strict=True)},
    }


def tournament(count: int) -> list[list[tuple[int, int]]]:
    """Rounds in which each plays at most once, until each has met each other (the circle method)."""
    places = [*range(count), *([] if count % 2 == 0 else [-1])]
    half = len(places) // 2
    rounds = []
    for _ in range(len(places) - 1):
        met = [(places[at], places[-1 - at]) for at in range(half)]
        rounds.append([pair for pair in met if -1 not in pair])
        places = [places[0], places[-1], *places[1:-1]]
    return rounds


def pairs(cluster: Cluster) -> Made:
    """Plain connections from each to each other; pairs that share no machine at the same time."""
    asked, found = cluster.asked, []

    def measured(pair: tuple[Host, Host]) -> dict[str, Any]:
        giver, taker = pair
        rate = socket_rate(giver, taker, asked.connections, asked.seconds)
        return {"from": giver.name, "to": taker.name, **rate._asdict()}

    for met in tournament(len(cluster.hosts)):
        ends = [(cluster.hosts[one], cluster.hosts[other]) for one, other in met]
        found += cluster.at_once(measured, ends)
        found += cluster.at_once(measured, [(other, one) for one, other in ends])
    rates = [pair["gbps"] for pair in found]
    return {
        "figures": {
            "link_median_gbps": median(rates),
            "link_slowest_gbps": min(rates),
            "link_fastest_gbps": max(rates),
            "giver_cpu_seconds_per_gb": median(pair["giver_cpu_seconds_per_gb"] for pair in found),
            "taker_cpu_seconds_per_gb": median(pair["taker_cpu_seconds_per_gb"] for pair in found),
        },
        "pairs": found,
    }


def _fan_out_to(strategy: str, count: int) -> Callable[[Cluster], Made]:
    def run(cluster: Cluster) -> Made:
        receivers = _receivers(cluster, strategy, count)
        seed = receivers.seed
        dones = _started(receivers.workers)
        sent = _sent([seed, *receivers.workers]) if seed is not None else []
        model_bytes = total_bytes(cluster.asked.shape)
        made = _made(receivers.workers, dones, model_bytes)
        made["fan_out"] = {"strategy": strategy, "receivers": count, "seconds": made["figures"]["seconds"]}
        made["figures"] |= {
            "receivers": count,
            "seed_sent_over_model": sent[0] / model_bytes,
            "most_sent_by_a_receiver_over_model": max(sent[1:]) / model_bytes,
        }
        if away := [name for name, done in dones.items() if done["path"] != "p2p"]:
            raise HostError(f"{', '.join(away)}: nothing came from others: {dones[away[0]]['failures']}")
        return made

    return run


class _Receivers(NamedTuple):
    seed: Child | None
    workers: list[Child]


def _receivers(cluster: Cluster, strategy: str, count: int, *, with_seed: bool = True) -> _Receivers:
    """Workers that are ready: the seed on the first machine, receivers on the next ones; without a seed on all."""
    server = cluster.server()
    readers = _READERS.get(strategy, max(1, count))
    first = cluster.hosts[0]
    seed = cluster.worker(first, server, "seed", strategy, readers=readers) if with_seed else None
    if seed is not None:
        seed.expect("serving")
    places = cluster.hosts[1 : count + 1] if with_seed else cluster.hosts
    workers = [
        cluster.worker(host, server, "receiver", strategy, readers=readers, from_folder=not with_seed)
        for host in places
    ]
    for worker in workers:
        worker.expect("ready")
    return _Receivers(seed, workers)


def _started(workers: Sequence[Child]) -> dict[str, Any]:
    """All at once; what each says when it is done, by its machine's name."""
    for worker in workers:
        worker.send("start")
    return {worker.host.name: _done(worker) for worker in workers}


def _done(worker: Child) -> dict[str, Any]:
    done = worker.expect("done", _LONG_SECONDS)
    if not done["right"]:
        raise HostError(f"{worker.host.name} has wrong bytes")
    return done


def _sent(workers: Sequence[Child]) -> list[int]:
    for worker in workers:
        worker.send("sent")
    return [int(worker.expect("sent")["bytes"]) for worker in workers]


def _made(workers: Sequence[Child], dones: dict[str, Any], model_bytes: int) -> Made:
    slowest = max(done["seconds"] for done in dones.values())
    gigabytes = model_bytes / 1e9
    return {
        "figures": {
            "seconds": slowest,
            "slowest_receiver_gbps": gigabytes / slowest,
            "taker_cpu_seconds_per_gb": median(done["cpu_seconds"] for done in dones.values()) / gigabytes,
            "bytes_again_over_model": sum(done["bytes_again"] for done in dones.values()) / model_bytes,
        },
        "model_bytes": model_bytes,
        "progress": {
            worker.host.name: [
                (round(at - dones[worker.host.name]["started"], 4), count) for at, count in worker.progress
            ]
            for worker in workers
            if worker.host.name in dones
        },
        "done": dones,
    }


def storage(cluster: Cluster) -> Made:
    """All machines start at once and nobody has the model: one reads it from files, the others take it from there."""
    receivers = _receivers(cluster, "swarm", len(cluster.hosts), with_seed=False)
    dones = _started(receivers.workers)
    made = _made(receivers.workers, dones, total_bytes(cluster.asked.shape))
    made["figures"]["storage_readers"] = sum(done["path"] == "storage" for done in dones.values())
    return made


def update(cluster: Cluster) -> Made:
    """All have a model and serve it; then the first machine has the next version, and all others take that instead."""
    receivers = _receivers(cluster, "swarm", len(cluster.hosts) - 1)
    _started(receivers.workers)
    assert receivers.seed is not None
    receivers.seed.send("next")
    receivers.seed.expect("serving")
    for worker in receivers.workers:
        worker.progress.clear()
        worker.send("next")
    for worker in receivers.workers:
        worker.expect("ready")
    dones = _started(receivers.workers)
    if away := [name for name, done in dones.items() if done["path"] != "p2p"]:
        raise HostError(f"{', '.join(away)}: the next version did not come from others: {dones[away[0]]['failures']}")
    return _made(receivers.workers, dones, total_bytes(cluster.asked.shape))


def killed(cluster: Cluster) -> Made:
    """Fan-out to all; the first receiver's process is killed when it has half of the model."""
    receivers = _receivers(cluster, "swarm", len(cluster.hosts) - 1)
    victim, *others = receivers.workers
    model_bytes = total_bytes(cluster.asked.shape)
    for worker in receivers.workers:
        worker.send("start")
    victim.until(model_bytes / 2, _LONG_SECONDS)
    victim.signal()
    dones = {worker.host.name: _done(worker) for worker in others}
    made = _made(others, dones, model_bytes)
    made["figures"]["from_storage"] = sum(done["path"] == "storage" for done in dones.values())
    made["killed"] = victim.host.name
    return made

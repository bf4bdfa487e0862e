"""Loads of one model that have ended, seen together: rollouts, how long replicas took, and who fed whom.

A rollout is all loads of a model of which none began later than ROLLOUT_GAP_SECONDS after the ones before had ended.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mxserver.telemetry import FinishedLoad, RunningLoad

Json = dict[str, Any]

ROLLOUT_GAP_SECONDS = 300.0
LISTED_RECEIVERS = 12  # of one giver

STORAGE = "storage"
UNNAMED = ""  # givers that a report does not name


@dataclass(frozen=True, slots=True)
class ReplicaLoad:
    """How one replica loaded. The parts are those of the rank that was ready last; times are Unix ms."""

    name: str
    pod: str
    node: str
    began_ms: float
    at_ms: int
    ranks: int
    path: str
    bytes: int
    bytes_from_workers: int
    wait_seconds: float
    transfer_seconds: float
    process_seconds: float

    @property
    def ready_seconds(self) -> float:
        """From the first rank's joining to the last one's report."""
        return max(0.0, (self.at_ms - self.began_ms) / 1000)

    def as_json(self) -> Json:
        return {
            "replica": self.name,
            "pod": self.pod,
            "node": self.node,
            "began_ms": round(self.began_ms),
            "at_ms": self.at_ms,
            "ranks": self.ranks,
            "path": self.path,
            "bytes": self.bytes,
            "bytes_from_workers": self.bytes_from_workers,
            "wait_seconds": round(self.wait_seconds, 3),
            "transfer_seconds": round(self.transfer_seconds, 3),
            "process_seconds": round(self.process_seconds, 3),
            "ready_seconds": round(self.ready_seconds, 3),
        }


class Rollout:
    """Loads that belong together, none of it empty."""

    def __init__(self, loads: Sequence[FinishedLoad]) -> None:
        self.loads = loads
        self.replicas = _by_replica(loads)
        self.began_ms = min(one.began_ms for one in self.replicas)
        self.at_ms = max(one.at_ms for one in self.replicas)
        self.counted_as = {one.pod or one.name for one in self.replicas}

    def as_json(self) -> Json:
        seconds = sorted(one.ready_seconds for one in self.replicas)
        return {
            "began_ms": round(self.began_ms),
            "at_ms": self.at_ms,
            "replicas": len(self.counted_as),
            "ranks": len(self.loads),
            "ready_seconds_p50": round(quantile(seconds, 0.5), 3),
            "ready_seconds_p95": round(quantile(seconds, 0.95), 3),
            "ready_seconds_all": round((self.at_ms - self.began_ms) / 1000, 3),
            **sums(self.loads),
        }


def rollouts(loads: Iterable[FinishedLoad]) -> list[Rollout]:
    """The newest first."""
    found: list[list[FinishedLoad]] = []
    until_ms = float("-inf")
    for load in sorted(loads, key=lambda one: one.began_ms):
        if load.began_ms > until_ms + 1000 * ROLLOUT_GAP_SECONDS:
            found.append([])
        found[-1].append(load)
        until_ms = max(until_ms, load.at_ms)
    return [Rollout(of) for of in reversed(found)]


def sums(loads: Sequence[FinishedLoad]) -> Json:
    """Bytes in all, and those that workers gave, which storage was spared."""
    return {
        "bytes": sum(one.bytes for one in loads),
        "bytes_from_workers": sum(one.bytes_from_workers for one in loads),
    }


def quantile(ascending: Sequence[float], share: float) -> float:
    """The nearest-rank quantile; 0 of nothing."""
    if not ascending:
        return 0.0
    at = -(-share * len(ascending) // 1)  # rounded up
    return ascending[max(0, min(len(ascending), int(at)) - 1)]


def _by_replica(loads: Iterable[FinishedLoad]) -> list[ReplicaLoad]:
    """In the order in which they began."""
    ranks: dict[str, list[FinishedLoad]] = defaultdict(list)
    for load in loads:
        ranks[load.replica].append(load)
    found = []
    for name, of in ranks.items():
        lowest = min(of, key=lambda one: one.key.worker_rank)
        last = max(of, key=lambda one: one.at_ms)
        most = max(of, key=lambda one: one.bytes)
        found.append(
            ReplicaLoad(
                name=name,
                pod=lowest.pod_name,
                node=lowest.node_name,
                began_ms=min(one.began_ms for one in of),
                at_ms=last.at_ms,
                ranks=len(of),
                path=most.path,
                bytes=sum(one.bytes for one in of),
                bytes_from_workers=sum(one.bytes_from_workers for one in of),
                wait_seconds=last.wait_seconds,
                transfer_seconds=last.transfer_seconds or last.seconds,
                process_seconds=last.process_seconds,
            )
        )
    return sorted(found, key=lambda one: (one.began_ms, one.name))


@dataclass(slots=True)
class _Edge:
    bytes: int = 0
    rate: float = 0.0
    running: bool = False


def feeds(
    finished: Iterable[FinishedLoad],
    running: Iterable[RunningLoad],
    replica_of: Mapping[str, str],
    named: Mapping[str, str],
    most: int,
) -> tuple[list[Json], int]:
    """Who gave whom how much, the one that gives or gave most first; and how many givers are left out.

    `replica_of` has replicas by worker id, `named` pods by replica. A rate is that of now where the giver gives, else
    the mean while the receiver received.
    """
    edges: dict[str, dict[str, _Edge]] = defaultdict(lambda: defaultdict(_Edge))
    for load in finished:
        seconds = load.transfer_seconds or load.seconds
        unnamed = load.bytes_from_workers - sum(given for _, given in load.given)
        parts = [(replica_of.get(worker, worker), given) for worker, given in load.given]
        parts += [(UNNAMED, unnamed), (STORAGE, load.bytes - load.bytes_from_workers)]
        for giver, given in parts:
            if given > 0:
                edge = edges[giver][load.replica]
                edge.bytes += given
                edge.rate += given / seconds if seconds > 0 else 0.0
    for now in running:
        receiver = replica_of.get(now.key.worker_id, now.key.worker_id)
        for one in now.given:
            edge = edges[replica_of.get(one.worker_id, one.worker_id)][receiver]
            if not edge.running:
                edge.running, edge.rate = True, 0.0
            edge.bytes += one.bytes
            edge.rate += one.bytes_per_second or 0.0
    ordered = sorted(edges.items(), key=lambda item: -sum(edge.bytes for edge in item[1].values()))
    return [_giver(giver, to, named) for giver, to in ordered[:most]], max(0, len(ordered) - most)


def _giver(giver: str, to: Mapping[str, _Edge], named: Mapping[str, str]) -> Json:
    ordered = sorted(to.items(), key=lambda item: (-item[1].bytes, item[0]))
    running = any(edge.running for edge in to.values())
    return {
        "from": giver,
        "pod": named.get(giver, ""),
        "bytes": sum(edge.bytes for edge in to.values()),
        "bytes_per_second": sum(edge.rate for edge in to.values() if edge.running) if running else None,
        "receivers_total": len(ordered),
        "receivers_left_out": max(0, len(ordered) - LISTED_RECEIVERS),
        "receivers": [
            {
                "replica": receiver,
                "pod": named.get(receiver, ""),
                "bytes": edge.bytes,
                "bytes_per_second": edge.rate,
                "running": edge.running,
            }
            for receiver, edge in ordered[:LISTED_RECEIVERS]
        ],
    }

"""A source is killed or stopped when half of the model has arrived: bytes sent twice, extra seconds, time to notice."""

from __future__ import annotations

import signal
import time
from dataclasses import dataclass
from typing import Any

from mxbench.fleet.fleet import Fleet, FleetError, Process

MODEL_BYTES = 192 << 20
RATE = 48 << 20  # bytes a second of a source
LONGEST_SECONDS = 120.0
TASK = {
    "model": "bench/failover",
    "content": 5,
    "model_bytes": MODEL_BYTES,
    "chunk_bytes": 1 << 20,
    "strategy": "star",
    "settings": {"MX_SOURCE_RATE_LIMIT": str(RATE), "MX_DRAIN_TIMEOUT_SECS": 1},
}


@dataclass(frozen=True)
class Failover:
    """`resent_ratio`: bytes sent twice over the model's. `seconds_on_top`: beyond what the others need for the rest."""

    resent_ratio: float
    seconds_on_top: float


def kill_at_half(transport: str, repeats: int) -> Failover:
    """The worst result of several repeats."""
    with Fleet() as fleet:
        _seed(fleet, transport)
        target = fleet.add({**TASK, "role": "receiver"}, transport=transport)
        target.expect("ready")
        alone = _receive(target)
        rate = MODEL_BYTES / alone["receive_seconds"]
        resent, on_top = [], []
        for _ in range(repeats):
            dies = _seed(fleet, transport)
            target.send("again")
            target.expect("ready")
            target.progress.clear()
            target.send("start")
            _until_half(target)
            dies.end()
            struck_at, had = time.monotonic(), target.progress[-1][1]
            done = _checked(target.expect("done"))
            resent.append(done["bytes_again"] / MODEL_BYTES)
            on_top.append(done["started"] + done["seconds"] - struck_at - (MODEL_BYTES - had) / rate)
        return Failover(max(resent), max(on_top))


def stop_at_half(transport: str) -> float:
    """Seconds until a receiver does without its only source, which was stopped. It must still end up right.

    It drops the source, or ends the receive, as of a holder that is busy for seconds: then its time at storage counts.
    """
    with Fleet() as fleet:
        source = _seed(fleet, transport)
        target = fleet.add({**TASK, "role": "receiver"}, transport=transport)
        target.expect("ready")
        target.send("start")
        _until_half(target)
        source.signal(signal.SIGSTOP)
        stopped_at = time.monotonic()
        done = target.expect("done", LONGEST_SECONDS)
        source.signal(signal.SIGCONT)
        if not done["right"] or done["path"] != "storage":
            raise FleetError(f"a receiver whose only source was stopped has no weights of storage: {done}")
        given_up_at = target.lost[0]["at"] if target.lost else done["started"] + done["seconds"]
        return float(given_up_at - stopped_at)


def _until_half(target: Process) -> None:
    deadline = time.monotonic() + LONGEST_SECONDS
    while not target.progress or target.progress[-1][1] < MODEL_BYTES / 2:
        if not target.alive or time.monotonic() > deadline:
            raise FleetError(f"a receiver did not get half; its log ends: {target.tail()}")
        time.sleep(0.002)


def _seed(fleet: Fleet, transport: str) -> Process:
    process = fleet.add({**TASK, "role": "seed"}, transport=transport)
    process.expect("serving")
    return process


def _receive(target: Process) -> dict[str, Any]:
    target.send("start")
    return _checked(target.expect("done"))


def _checked(done: dict[str, Any]) -> dict[str, Any]:
    if not done["right"] or done["path"] != "p2p":
        raise FleetError(f"a receiver did not get its weights from others: {done}")
    return done

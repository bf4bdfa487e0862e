"""Runs of one fleet: two sources, three receivers, and a fault in the middle."""

from __future__ import annotations

import random
import time

import click

from mxbench.chaos.faults import CUTS, FAULTS, Scene, Struck
from mxbench.chaos.tally import Tally
from mxbench.fleet.fleet import Fleet, FleetError, Process

LATE_SECONDS = 5.0
FINISH_SECONDS = 150.0
SOURCES, TARGETS = 2, 3
MODEL_BYTES = 24 << 20
CHUNK_BYTES = 256 << 10
LINK_MEGABITS = 400.0
TASK = {
    "model": "bench/chaos",
    "content": 5,
    "model_bytes": MODEL_BYTES,
    "chunk_bytes": CHUNK_BYTES,
    "strategy": "swarm",
    "settings": {
        "MX_SOURCE_RATE_LIMIT": "16MB",  # slow enough for something to happen in the middle
        "MX_SERVER_TIMEOUT_SECS": 3,
        "MX_HEARTBEAT_INTERVAL_SECS": 1,
        "MX_SOURCE_WAIT_SECS": 30,
        "MX_DRAIN_TIMEOUT_SECS": 1,  # between runs: a killed reader holds its lease for 15 s
    },
}


class Chaos:
    """A fleet that is used for several runs; lost workers are replaced."""

    def __init__(self, fleet: Fleet, chance: random.Random, tally: Tally, transport: str) -> None:
        self.fleet = fleet
        self.chance = chance
        self.tally = tally
        self.transport = transport
        self.sources: list[tuple[Process, str]] = []
        self.targets: list[Process] = []

    @property
    def workers(self) -> frozenset[Process]:
        """All of them."""
        return frozenset([*self.targets, *(process for process, _ in self.sources)])

    def run(self, fault: str) -> None:
        """Plays one run and adds the outcome to the tally."""
        self._fill()
        for target in self.targets:
            target.progress.clear()
            target.lost.clear()
            target.send("start")
        victim = self.chance.choice(self.targets)
        victim.until(self.chance.uniform(0.05, 0.7) * MODEL_BYTES, FINISH_SECONDS)
        source, source_id = self.chance.choice(self.sources)
        at = time.monotonic()
        struck = {**FAULTS, **CUTS}[fault](Scene(self.fleet, self.chance, source, victim, self.workers))
        self.tally.runs += 1
        self.tally.by_fault[fault] = self.tally.by_fault.get(fault, 0) + 1
        try:
            for target in [target for target in self.targets if target not in struck.lost]:
                self._finished(target)
                if struck.source_is_gone:
                    self._noticed(target, source_id, at)
        finally:
            struck.end()
        self._replace(struck)

    def _fill(self) -> None:
        sources = [self._add("seed") for _ in range(SOURCES - len(self.sources))]
        targets = [self._add("receiver") for _ in range(TARGETS - len(self.targets))]
        self.sources += [(process, process.expect("serving")["worker"]) for process in sources]
        for process in targets:
            process.expect("ready")
        self.targets += targets

    def _add(self, role: str) -> Process:
        return self.fleet.add({**TASK, "role": role}, transport=self.transport)

    def _finished(self, target: Process) -> None:
        try:
            done = target.expect("done", FINISH_SECONDS)
        except FleetError as error:
            self.tally.unfinished += 1
            click.echo(f"unfinished: {error}", err=True)
            target.end()
            return
        self.tally.wrong_weights += not done["right"]
        if done["path"] == "storage":
            self.tally.from_storage += 1
            click.echo(f"from storage, after {done['failures']}; its log ends: {target.tail()}", err=True)
        self.tally.bytes_again.append(done["bytes_again"] / MODEL_BYTES)

    def _noticed(self, target: Process, source_id: str, struck_at: float) -> None:
        """How long this target took to drop the source, if it was using it."""
        for loss in target.lost:
            if loss["worker"] != source_id or loss["at"] <= struck_at:
                continue
            seconds = min(loss["at"] - struck_at, loss["asked_seconds"])  # it may have turned to it only afterwards
            self.tally.notice_seconds.append(seconds)
            if seconds > LATE_SECONDS:
                click.echo(f"noticed after {seconds:.1f} s: {target.lost}\nits log ends: {target.tail()}", err=True)
            return

    def _replace(self, struck: Struck) -> None:
        for process in self.workers - struck.lost:
            if not process.alive:
                self.tally.engines_lost += 1
                click.echo(f"an engine was lost; its log ends: {process.tail()}", err=True)
        for process in struck.lost:
            process.end()
        self.sources = [(process, name) for process, name in self.sources if process.alive]
        self.targets = [process for process in self.targets if process.alive]
        for target in self.targets:
            target.send("again")
            target.expect("ready")

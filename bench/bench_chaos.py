"""A fleet whose workers and server are killed, stopped and cut off at random: does everybody else finish, and right?"""

from __future__ import annotations

import json
import random
import secrets
import signal
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import click

from bench.fleet import Fleet, FleetError, Process

LATE_SECONDS = 5.0
MODEL_BYTES = 24 << 20
CHUNK_BYTES = 256 << 10
RATE_LIMIT = "16MB"  # of a source: slow enough for something to happen in the middle
FAULTS = (
    "kill a target while its source is stalled",
    "kill a source",
    "stop a source",
    "kill a target",
    "stop a target",
    "kill the server",
    "kill a source and a target",
)
TASK = {
    "model": "bench/chaos",
    "content": 5,
    "model_bytes": MODEL_BYTES,
    "chunk_bytes": CHUNK_BYTES,
    "strategy": "swarm",
    "settings": {
        "MX_SOURCE_RATE_LIMIT": RATE_LIMIT,
        "MX_SERVER_TIMEOUT_SECS": 3,
        "MX_HEARTBEAT_INTERVAL_SECS": 1,
        "MX_SOURCE_WAIT_SECS": 30,
        "MX_DRAIN_TIMEOUT_SECS": 1,  # between runs: a killed reader holds its lease for 15 s
    },
}


@dataclass
class Tally:
    """What came of all runs."""

    runs: int = 0
    unfinished: int = 0
    engines_lost: int = 0
    wrong_weights: int = 0
    from_storage: int = 0
    bytes_again: list[float] = field(default_factory=list)  # of a receiver, in models
    notice_seconds: list[float] = field(default_factory=list)
    by_fault: dict[str, int] = field(default_factory=dict)

    def figures(self) -> dict[str, Any]:
        """The flat map of a bench."""
        again = self.bytes_again or [0.0]
        return {
            "runs": self.runs,
            "unfinished": self.unfinished,
            "engines_lost": self.engines_lost,
            "wrong_weights": self.wrong_weights,
            "resent_ratio": round(sum(again) / len(again), 4),
            "most_resent_ratio": round(max(again), 4),
            "max_notice_seconds": round(max(self.notice_seconds, default=0.0), 2),
            "loads_from_storage": self.from_storage,
            "kills_of_a_target_with_a_stalled_source": self.by_fault.get(FAULTS[0], 0),
        }


class Chaos:
    """Two sources and three receivers, all of them replaced or used again from run to run."""

    def __init__(self, fleet: Fleet, chance: random.Random, tally: Tally, transport: str) -> None:
        self.fleet = fleet
        self.chance = chance
        self.tally = tally
        self.transport = transport
        self.sources: list[tuple[Process, str]] = []
        self.targets: list[Process] = []

    def run(self, fault: str) -> None:
        """One run; what happened goes to the tally."""
        self._fill()
        for target in self.targets:
            target.progress.clear()
            target.lost.clear()
            target.send("start")
        victim = self.chance.choice(self.targets)
        self._until(victim, self.chance.uniform(0.05, 0.7) * MODEL_BYTES)
        source, source_id = self.chance.choice(self.sources)
        at = time.monotonic()
        spared = self._strike(fault, source, victim)
        self.tally.runs += 1
        self.tally.by_fault[fault] = self.tally.by_fault.get(fault, 0) + 1
        for target in [target for target in self.targets if target in spared]:
            self._finished(target)
            if source not in spared:
                noticed = [(when - at, why) for when, worker, why in target.lost if worker == source_id and when > at]
                for seconds, why in noticed[:1]:
                    self.tally.notice_seconds.append(seconds)
                    if seconds > LATE_SECONDS:
                        click.echo(f"noticed after {seconds:.1f} s: {why}", err=True)
        for process in [process for process in (*self.targets, *(p for p, _ in self.sources)) if process in spared]:
            self.tally.engines_lost += not process.alive
        if fault == "kill the server":
            self.fleet.start_server()
        for process in [p for p in (*self.targets, *(p for p, _ in self.sources)) if p not in spared or not p.alive]:
            process.end()
        self.sources = [(process, name) for process, name in self.sources if process.alive]
        self.targets = [process for process in self.targets if process.alive]
        for target in self.targets:
            target.send("again")
            target.expect("ready")

    def _fill(self) -> None:
        new_sources = [
            self.fleet.add({**TASK, "role": "seed"}, transport=self.transport) for _ in range(2 - len(self.sources))
        ]
        new = [
            self.fleet.add({**TASK, "role": "receiver"}, transport=self.transport) for _ in range(3 - len(self.targets))
        ]
        self.sources += [(process, process.expect("serving")["worker"]) for process in new_sources]
        for process in new:
            process.expect("ready")
        self.targets += new

    def _until(self, target: Process, count: float) -> None:
        deadline = time.monotonic() + 60
        while not target.progress or target.progress[-1][1] < count:
            if time.monotonic() > deadline or not target.alive:
                raise FleetError("a receiver did not get going")
            time.sleep(0.002)

    def _strike(self, fault: str, source: Process, victim: Process) -> set[Process]:
        """Does it; returns the processes that must live on."""
        everybody = {*self.targets, *(process for process, _ in self.sources)}
        if fault == "kill a target while its source is stalled":
            source.signal(signal.SIGSTOP)
            time.sleep(self.chance.uniform(0.02, 0.3))
            victim.signal(signal.SIGKILL)
            victim.popen.wait()
            time.sleep(self.chance.uniform(0.0, 0.3))
            source.signal(signal.SIGCONT)
            return everybody - {victim}
        if fault == "kill the server":
            self.fleet.server.kill()
            self.fleet.server.wait()
            return everybody
        number = signal.SIGSTOP if fault.startswith("stop") else signal.SIGKILL
        hit = {process for process, name in ((source, "source"), (victim, "target")) if name in fault}
        for process in hit:
            process.signal(number)
        return everybody - hit

    def _finished(self, target: Process) -> None:
        try:
            done = target.expect("done", 90)
        except FleetError as error:
            self.tally.unfinished += 1
            click.echo(f"unfinished: {error}", err=True)
            return
        self.tally.wrong_weights += not done["right"]
        self.tally.from_storage += done["path"] == "storage"
        self.tally.bytes_again.append(done["bytes_again"] / MODEL_BYTES)


@click.command()
@click.option("--runs", default=20, show_default=True, help="How many runs.")
@click.option("--seed", type=int, help="Of the random choices; printed, so that a run can be repeated.")
@click.option(
    "--transport", "transports", multiple=True, type=click.Choice(["tcp", "same-host"]), help="Default: half and half."
)
@click.option(
    "--fault",
    "faults",
    multiple=True,
    type=click.Choice(FAULTS),
    help="Default: all, the first as often as the others together.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(runs: int, seed: int | None, transports: tuple[str, ...], faults: tuple[str, ...], as_json: bool) -> None:
    """Kills and stops workers and the server in the middle of transfers; whoever is left must end up right."""
    seed = secrets.randbelow(1 << 32) if seed is None else seed
    click.echo(f"seed {seed}", err=True)
    chance = random.Random(seed)
    tally = Tally()
    used = transports or ("tcp", "same-host")
    choices = faults or (*FAULTS, *FAULTS[:1] * (len(FAULTS) - 2))
    for number, transport in enumerate(used):
        with Fleet() as fleet:
            chaos = Chaos(fleet, chance, tally, transport)
            for _ in range(runs * (number + 1) // len(used) - runs * number // len(used)):
                fault = chance.choice(choices)
                chaos.run(fault)
                click.echo(f"{tally.runs}: {transport}, {fault}: {json.dumps(tally.figures())}", err=True)
    if as_json:
        json.dump({"bench": "chaos", "seed": seed, "by_fault": tally.by_fault, "figures": tally.figures()}, sys.stdout)
        sys.stdout.write("\n")
    else:
        for name, value in tally.figures().items():
            click.echo(f"{name:44} {value}")


if __name__ == "__main__":
    command()

"""A soak: many transfers between the same two processes. Do their memory, threads and descriptors stay as they are?

Receivers come, go, give up in the middle, and are killed. Run it by `make soak`.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np

from mxbench.fleet.certificates import certificates
from mxbench.fleet.fleet import BY_NIXL, Fleet, FleetError, Process
from mxbench.hostile.liars import receive, start
from mxbench.hostile.strangers import rss_mib
from mxbench.results import document, json_option

WAYS = {  # by name: the transport, whether both have certificates, and its share of the transfers
    "sockets": ("tcp", False, 0.3),
    "sockets_tls": ("tcp", True, 0.3),
    "same_host": ("same-host", False, 0.2),
    "nixl": (BY_NIXL, False, 0.1),
    "nixl_tls": (BY_NIXL, True, 0.1),
}
WHOLE, CANCELLED = 8, 2  # of a block, after which both processes are looked at
BLOCK = WHOLE + CANCELLED
KILL_EVERY = 5  # blocks
WARM_SHARE = 0.4  # of the blocks: until pools of threads and of memory are as large as they get
ONE_ARENA = {"MALLOC_ARENA_MAX": "1"}  # each thread's own would be filled over hundreds of transfers, without a leak
QUIET_SECONDS = 60.0
SETTLE_SECONDS = 1.0


@dataclass
class Course:
    """What one process had after each block, in the same order."""

    rss_mib: list[float] = field(default_factory=list)
    threads: list[int] = field(default_factory=list)
    descriptors: list[int] = field(default_factory=list)

    def look(self, pid: int) -> None:
        """Adds a sample."""
        self.rss_mib.append(rss_mib(pid))
        self.threads.append(_settled(pid, "task", self.threads))
        self.descriptors.append(_settled(pid, "fd", self.descriptors))

    def grown(self) -> dict[str, float]:
        """What came on top after warming up: MiB by the slope of a line through all samples, and their noise about it.

        Of threads and descriptors the fewest of the second half count, over the fewest of the first: one that is about
        to end is no leak.
        """
        rss = self.rss_mib[int(len(self.rss_mib) * WARM_SHARE) :]
        places = np.arange(len(rss))
        line = np.polyfit(places, rss, 1) if len(rss) > 1 else np.array([0.0, rss[0]])
        return {
            "rss_mib": round(float(line[0]) * (len(rss) - 1), 2),
            "rss_noise_mib": round(float(np.std(np.array(rss) - np.polyval(line, places))), 2),
            "threads": _more(self.threads),
            "descriptors": _more(self.descriptors),
        }


def _more(counts: list[int]) -> int:
    warm, half = int(len(counts) * WARM_SHARE), (len(counts) + int(len(counts) * WARM_SHARE)) // 2
    return min(counts[half:]) - min(counts[warm:half] or counts)


def _settled(pid: int, folder: str, before: list[int]) -> int:
    """How many there are; what is about to end, such as the threads of a transfer that was cancelled, has its time."""
    give_up = time.monotonic() + SETTLE_SECONDS
    while (count := _entries(pid, folder)) > (before[-1] if before else count) and time.monotonic() < give_up:
        time.sleep(0.02)
    return count


def _entries(pid: int, folder: str) -> int:
    return sum(1 for _ in Path(f"/proc/{pid}/{folder}").iterdir())


@dataclass
class Soaked:
    """Transfers by how they ended, and for each way and process what came on top."""

    outcomes: Counter[str] = field(default_factory=Counter)
    kills: int = 0
    courses: dict[str, Course] = field(default_factory=dict)

    def figures(self) -> dict[str, Any]:
        """The worst of all processes."""
        grown = [course.grown() for course in self.courses.values()]
        return {
            "soak_transfers": sum(self.outcomes.values()),
            "soak_kills": self.kills,
            **{f"soak_{name}": self.outcomes[name] for name in ("right", "cancelled", "refused", "wrong")},
            "soak_rss_growth_mib": max(each["rss_mib"] for each in grown),
            "soak_rss_noise_mib": max(each["rss_noise_mib"] for each in grown),
            "soak_threads_more": max(each["threads"] for each in grown),
            "soak_descriptors_more": max(each["descriptors"] for each in grown),
        }


def soak(transfers: int, seed: int, ways: Mapping[str, tuple[str, bool, float]] | None = None) -> Soaked:
    """So many transfers in all, by one way after the other. Raises FleetError where a process does not get quiet."""
    soaked = Soaked()
    chance = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        for name, (transport, with_tls, share) in (ways or WAYS).items():
            environ = {**ONE_ARENA, **(certificates(Path(folder)) if with_tls else {})}
            with Fleet(server=False) as fleet:
                _soak(fleet, name, transport, environ, max(1, round(transfers * share / BLOCK)), chance, soaked)
    return soaked


def _soak(
    fleet: Fleet, way: str, transport: str, environ: dict[str, str], blocks: int, chance: random.Random, into: Soaked
) -> None:
    holder = start(fleet, transport, environ, role="seed")
    receiver = start(fleet, transport, environ, role="receiver")
    sources = [holder.expect("serving")["source"]]
    receiver.expect("ready")
    courses = {side: into.courses.setdefault(f"{way} {side}", Course()) for side in ("holder", "receiver")}
    for block in range(blocks):
        into.outcomes.update(receive(receiver, sources, WHOLE, chance))
        into.outcomes.update(receive(receiver, sources, CANCELLED, chance, "cancelled"))
        receiver.send("again")
        receiver.expect("ready")
        if block % KILL_EVERY == 0:
            _kill_a_reader(fleet, transport, environ, sources, chance)
            into.kills += 1
        _until_quiet(holder)
        courses["holder"].look(holder.popen.pid)
        courses["receiver"].look(receiver.popen.pid)
    told = {side: course.grown() for side, course in courses.items()}
    click.echo(f"{way}: {BLOCK * blocks} transfers, {dict(into.outcomes)}, {json.dumps(told)}", err=True)


def _kill_a_reader(
    fleet: Fleet, transport: str, environ: dict[str, str], sources: list[dict[str, str]], chance: random.Random
) -> None:
    """A third process receives again and again, and is killed meanwhile."""
    victim = start(fleet, transport, environ, role="receiver")
    victim.expect("ready")
    victim.send(f"receive 1 0 whole {json.dumps(sources, separators=(',', ':'))}")
    victim.expect("received")
    victim.send(f"receive 100000 1 whole {json.dumps(sources, separators=(',', ':'))}")
    with suppress(FleetError):
        victim.expect("received", chance.uniform(0.05, 0.3))
    victim.end()


def _until_quiet(holder: Process) -> None:
    """Waits until nobody reads: a killed reader's lease ends by itself."""
    give_up = time.monotonic() + QUIET_SECONDS
    while True:
        holder.send("leases")
        if not (left := holder.expect("leases")["count"]):
            return
        if time.monotonic() > give_up:
            raise FleetError(f"{left} leases did not end; the holder's log ends: {holder.tail()}")
        time.sleep(0.05)


@click.command()
@click.option(
    "--transfers", type=click.IntRange(1), default=1000, show_default=True, help="In all, split over the ways."
)
@click.option("--seed", default=1, show_default=True, help="Of orders, and of the moments of kills.")
@click.option("--way", "ways", multiple=True, type=click.Choice(list(WAYS)), help="This one alone, with its share.")
@json_option
def command(transfers: int, seed: int, ways: tuple[str, ...], as_json: bool) -> None:
    """Many transfers between the same two processes, by each way; what came on top after warming up."""
    soaked = soak(transfers, seed, {name: WAYS[name] for name in ways} or None)
    if as_json:
        grown = {name: course.grown() for name, course in soaked.courses.items()}
        asked = {"transfers": transfers, "seed": seed, "ways": list(ways)}
        json.dump(document("soak", soaked.figures(), settings=asked, processes=grown), sys.stdout)
        sys.stdout.write("\n")
        return
    for name, value in soaked.figures().items():
        click.echo(f"{name:32} {value}")


if __name__ == "__main__":
    command()

"""Kills, stops and cuts off workers and the server of a fleet at random: do the others finish, with the right bytes?"""

from __future__ import annotations

import json
import os
import random
import secrets
import sys
from contextlib import ExitStack
from typing import Any

import click

from mxbench.chaos.bad_memory import flip_and_wait
from mxbench.chaos.failover import kill_at_half, stop_at_half
from mxbench.chaos.faults import CUTS, FAULTS
from mxbench.chaos.flips import flip_bytes
from mxbench.chaos.runs import LINK_MEGABITS, SOURCES, TARGETS, Chaos
from mxbench.chaos.tally import STALLED, Tally
from mxbench.fleet.fleet import BY_NIXL, Fleet, Network
from mxbench.hostile.liars import receive_from_liars
from mxbench.hostile.readers import attack_all
from mxbench.hostile.strangers import strangers_beside
from mxbench.results import document, json_option

FAILOVER_REPEATS = 3
SETTINGS = ("tcp", BY_NIXL, "same-host", "network")


def choose(chance: random.Random, setting: str, faults: tuple[str, ...]) -> str:
    """Chooses the fault of one run. Unless the user chose faults, every third run stalls a source."""
    possible: list[str] = [*FAULTS, *(CUTS if setting == "network" else ())]
    if faults:
        return chance.choice([fault for fault in possible if fault in faults] or possible)
    return STALLED if chance.random() < 1 / 3 else chance.choice(possible)


def play(setting: str, runs: int, faults: tuple[str, ...], chance: random.Random, tally: Tally) -> None:
    """Plays `runs` runs with one fleet."""
    with ExitStack() as stack:
        network = None
        if setting == "network":
            network = stack.enter_context(Network(SOURCES + TARGETS, LINK_MEGABITS))
        fleet = stack.enter_context(Fleet(network))
        chaos = Chaos(fleet, chance, tally, "tcp" if network else setting)
        for _ in range(runs):
            fault = choose(chance, setting, faults)
            chaos.run(fault)
            click.echo(f"{tally.runs}: {setting}, {fault}: {json.dumps(tally.figures())}", err=True)


def trust(liars: int, self_checks: int, hostile: bool, stranger_seconds: float, seed: int) -> dict[str, Any]:
    """Figures of those who lie, of memory that breaks, of readers that attack and of strangers."""
    figures: dict[str, Any] = {}
    if liars:
        lied = receive_from_liars(liars, seed)
        figures["receives_from_liars"], figures["wrong_from_liars"] = lied.receives, lied.wrong
        figures["p2p_share_with_one_liar"] = round(lied.by_peers / lied.receives, 4)
    if self_checks:
        noticed = flip_and_wait(self_checks, seed)
        figures["self_check_seconds_to_notice"] = round(noticed.seconds, 2)
        figures["self_check_seconds_limit"] = round(noticed.limit_seconds, 2)
    if hostile:
        attacked = attack_all()
        figures["bytes_written_by_readers"] = attacked.bytes_written
        figures["strangers_let_in_by_mtls"] = attacked.strangers_let_in
        if attacked.left_out:
            click.echo(f"left out: {attacked.left_out}", err=True)
    if stranger_seconds:
        beset = strangers_beside(stranger_seconds, seed)
        figures["stranger_calls"], figures["worker_rss_growth_mib"] = beset.calls, round(beset.growth_mib, 1)
        figures["receives_beside_strangers"], figures["not_right_beside_strangers"] = beset.receives, beset.wrong
    return figures


@click.command()
@click.option(
    "--runs", type=click.IntRange(0), default=20, show_default=True, help="How many runs, split over the settings."
)
@click.option("--seed", type=int, help="Of the random choices; printed, so that a run can be repeated.")
@click.option(
    "--setting",
    "settings",
    multiple=True,
    type=click.Choice(SETTINGS),
    help="What they share: TCP, TCP by NIXL, cross-memory attach, or TCP over a link each (needs root). Default: all.",
)
@click.option("--fault", "faults", multiple=True, type=click.Choice([*FAULTS, *CUTS]), help="Default: all.")
@click.option(
    "--flips",
    type=click.IntRange(0),
    default=10_000,
    show_default=True,
    help="How many bytes are flipped, one in a chunk.",
)
@click.option(
    "--failover/--no-failover", default=True, show_default=True, help="Kill or stop a source at half, and measure."
)
@click.option(
    "--liars",
    type=click.IntRange(0),
    default=1000,
    show_default=True,
    help="Receives from three holders of which one lies; 0: none.",
)
@click.option(
    "--self-checks",
    type=click.IntRange(0),
    default=3,
    show_default=True,
    help="Bits flipped in holders that look at themselves.",
)
@click.option("--hostile/--no-hostile", default=True, show_default=True, help="Readers that try to change weights.")
@click.option(
    "--strangers",
    type=click.FloatRange(0),
    default=20.0,
    show_default=True,
    help="Seconds of strangers' calls; 0: none.",
)
@json_option
def command(
    runs: int,
    seed: int | None,
    settings: tuple[str, ...],
    faults: tuple[str, ...],
    flips: int,
    failover: bool,
    liars: int,
    self_checks: int,
    hostile: bool,
    strangers: float,
    as_json: bool,
) -> None:
    """Kills, stops and cuts off workers and the server in the middle of transfers; the others must end up right.

    Then holders that lie, memory that breaks, readers that try to change weights, and strangers on a worker's ports.
    """
    seed = secrets.randbelow(1 << 32) if seed is None else seed
    click.echo(f"seed {seed}", err=True)
    chance = random.Random(seed)
    tally = Tally()
    used = settings or SETTINGS
    if os.geteuid() != 0 and "network" in used:
        click.echo("without root there are no network namespaces: links are not cut", err=True)
        used = tuple(setting for setting in used if setting != "network") or ("tcp",)
    for number, setting in enumerate(used):
        play(setting, runs * (number + 1) // len(used) - runs * number // len(used), faults, chance, tally)
    figures: dict[str, Any] = tally.figures()
    if failover:
        at_half = kill_at_half("tcp", FAILOVER_REPEATS)
        figures["killed_at_half_resent_ratio"] = round(at_half.resent_ratio, 4)
        figures["killed_at_half_seconds_on_top"] = round(at_half.seconds_on_top, 2)
        stops = {transport: stop_at_half(transport) for transport in ("tcp", BY_NIXL, "same-host")}
        figures["stopped_source_noticed_seconds"] = round(max(stops.values()), 2)
        figures["max_notice_seconds"] = round(max(figures["max_notice_seconds"], *stops.values()), 2)
    if flips:
        flipped = flip_bytes(flips, seed)
        figures["flipped_bytes"], figures["flipped_bytes_caught"] = flipped.made, flipped.caught
        figures["right_chunks_refused"] = flipped.false_alarms
    figures |= trust(liars, self_checks, hostile, strangers, seed)
    if as_json:
        asked = {"runs": runs, "seed": seed, "settings": list(used), "faults": list(faults), "flips": flips}
        asked |= {"failover": failover, "liars": liars, "self_checks": self_checks, "strangers": strangers}
        told = document("chaos", figures, settings=asked, seed=seed, by_fault=tally.by_fault)
        json.dump(told, sys.stdout)
        sys.stdout.write("\n")
    else:
        for name, value in figures.items():
            click.echo(f"{name:44} {value}")


if __name__ == "__main__":
    command()

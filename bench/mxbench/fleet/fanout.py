"""One seed and N receivers, each in a network namespace with a shaped link: all together, compared with one alone."""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from mxbench.control.processes import cpu_seconds
from mxbench.fleet.fleet import Fleet, Network
from mxbench.fleet.free_ports import free_port
from mxbench.results import NewFile, document, json_option

MIB = 1 << 20
RECEIVERS = (8, 32)
MOST_AT_FULL_RATE = 8


@dataclass
class Round:
    """One fan-out: seconds until the last receiver had everything, what the seed sent, each one's progress."""

    seconds: float
    sent_bytes: list[int]  # the seed's first
    progress: list[list[tuple[float, int]]] = field(default_factory=list)
    bytes_again: int = 0
    seed_cpu_seconds: float = 0.0
    server_calls: int = 0


def fan_out(receivers: int, strategy: str, megabytes: int, megabits: float, chunk_mib: float) -> Round:
    """Runs one fan-out. `strategy`: star (all from the seed), doubling (a finished copy serves one), swarm (ours)."""
    readers = {"star": receivers, "doubling": 1, "swarm": 8}[strategy]
    task = {
        "model": "bench/fanout",
        "content": 5,
        "model_bytes": megabytes * MIB,
        "chunk_bytes": int(chunk_mib * MIB),
        "strategy": strategy,
        "settings": {"MX_SOURCE_MAX_READERS": readers, "MX_STALL_TIMEOUT_SECS": 30, "MX_TRANSFER_TIMEOUT": 600},
    }
    with Network(receivers + 1, megabits) as network, Fleet(network, metrics_port=free_port()) as fleet:
        seed = fleet.add({**task, "role": "seed"})
        seed.expect("serving")
        workers = [fleet.add({**task, "role": "receiver"}) for _ in range(receivers)]
        for worker in workers:
            worker.expect("ready")
        started, used, calls = time.monotonic(), cpu_seconds(seed.popen.pid), fleet.server_calls()
        for worker in workers:
            worker.send("start")
        done = [worker.expect("done", 600) for worker in workers]
        if wrong := [message for message in done if not message["right"] or message["path"] != "p2p"]:
            raise click.ClickException(f"a receiver did not get its weights from others: {wrong}")
        last = max(message["started"] + message["seconds"] for message in done)
        sent = []
        for process in (seed, *workers):
            process.send("sent")
            sent.append(process.expect("sent")["bytes"])
        progress = [[(at - started, count) for at, count in worker.progress] for worker in workers]
        again = sum(message["bytes_again"] for message in done)
        used = cpu_seconds(seed.popen.pid) - used
        return Round(last - started, sent, progress, again, used, fleet.server_calls() - calls)


def plot(rounds: dict[str, Round], model_bytes: int, file: Path) -> None:
    """Draws the progress of every receiver over time, one panel per strategy, into an image file."""
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise click.ClickException("--plot needs matplotlib: make bench-deps") from error

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(rounds), figsize=(5 * len(rounds), 4), sharey=True, squeeze=False)
    for axis, (name, result) in zip(axes[0], rounds.items(), strict=True):
        for line in result.progress:
            axis.plot([at for at, _ in line], [100 * count / model_bytes for _, count in line], linewidth=1)
        axis.set(title=name, xlabel="seconds", xlim=(0, None))
    axes[0][0].set_ylabel("% of the model")
    figure.tight_layout()
    figure.savefig(file)


def shaped(receivers: int, megabits: float) -> float:
    """The rate of a link that this machine bears for so many: what eight have at once is shared."""
    return megabits * min(1.0, MOST_AT_FULL_RATE / receivers)


@click.command()
@click.option(
    "--receivers",
    "counts",
    multiple=True,
    type=click.IntRange(1),
    help="How many receive at once.  [default: 8 and 32]",
)
@click.option("--megabytes", type=click.IntRange(1), default=96, show_default=True, help="Size of the model, MiB.")
@click.option(
    "--megabits",
    type=click.FloatRange(0, min_open=True),
    default=80.0,
    show_default=True,
    help="Rate of every link, each way, Mbit/s; less beyond 8.",
)
@click.option(
    "--chunk-mib", type=click.FloatRange(0, min_open=True), default=0.5, show_default=True, help="Size of a chunk, MiB."
)
@click.option("--strategy", "strategies", multiple=True, type=click.Choice(["star", "doubling", "swarm"]))
@click.option("--plot", "plot_file", type=NewFile(), help="Draw progress here.")
@json_option
def command(
    counts: tuple[int, ...],
    megabytes: int,
    megabits: float,
    chunk_mib: float,
    strategies: tuple[str, ...],
    plot_file: Path | None,
    as_json: bool,
) -> None:
    """Fan-out of a model from one seed over shaped links (needs root: network namespaces).

    Each number of receivers is compared with one at the same rate. More than eight have slower links, so that the two
    cores of a small machine are no limit. Other strategies are for the first number alone.
    """
    if os.geteuid() != 0:
        raise click.ClickException("fanout makes network namespaces, which only root may")
    figures: dict[str, Any] = {}
    rounds: dict[str, Round] = {}
    for position, count in enumerate(counts or RECEIVERS):
        rate = shaped(count, megabits)
        single = fan_out(1, "swarm", megabytes, rate, chunk_mib)
        click.echo(f"1 receiver, {rate:g} Mbit/s: {single.seconds:.2f} s", err=True)
        figures[f"t1_seconds_at_{rate:g}_megabits"] = round(single.seconds, 3)
        for strategy in strategies or (("star", "doubling", "swarm") if position == 0 else ("swarm",)):
            result = fan_out(count, strategy, megabytes, rate, chunk_mib)
            rounds.setdefault(strategy, result)
            figures |= figures_of(strategy, count, result, single, megabytes * MIB)
            click.echo(
                f"{count} receivers, {strategy}: {result.seconds:.2f} s, "
                f"{result.seconds / single.seconds:.2f} x one; sent, seed first, in models: "
                + " ".join(f"{sent / (megabytes * MIB):.2f}" for sent in result.sent_bytes),
                err=True,
            )
    if plot_file is not None:
        plot(rounds, megabytes * MIB, plot_file)
    if as_json:
        settings = {
            "receivers": list(counts or RECEIVERS),
            "megabytes": megabytes,
            "megabits": megabits,
            "chunk_mib": chunk_mib,
        }
        json.dump(document("fanout", figures, settings=settings), sys.stdout)
        sys.stdout.write("\n")
    else:
        for name, value in figures.items():
            click.echo(f"{name:36} {value}")


def figures_of(strategy: str, receivers: int, result: Round, single: Round, model_bytes: int) -> dict[str, float]:
    """Of one round. Those of the swarm say what the seed, its receivers and the server did for it."""
    ratio = round(result.seconds / single.seconds, 3)
    if strategy != "swarm":
        return {f"{strategy}_t{receivers}_over_t1": ratio}
    return {
        f"t{receivers}_over_t1": ratio,
        f"seed_sent_over_model_{receivers}": round(result.sent_bytes[0] / model_bytes, 3),
        f"most_sent_by_a_receiver_over_model_{receivers}": round(max(result.sent_bytes[1:]) / model_bytes, 3),
        f"bytes_again_over_model_{receivers}": round(result.bytes_again / model_bytes, 4),
        f"seed_cpu_seconds_{receivers}": round(result.seed_cpu_seconds, 3),
        f"server_calls_{receivers}": result.server_calls,
    }


if __name__ == "__main__":
    command()

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

from bench.fleet.fleet import Fleet, Network
from mxbench.results import NewFile, document

MIB = 1 << 20


@dataclass
class Round:
    """One fan-out: seconds until the last receiver had everything, what the seed sent, each one's progress."""

    seconds: float
    sent_bytes: list[int]  # the seed's first
    progress: list[list[tuple[float, int]]] = field(default_factory=list)
    bytes_again: int = 0


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
    with Network(receivers + 1, megabits) as network, Fleet(network) as fleet:
        seed = fleet.add({**task, "role": "seed"})
        seed.expect("serving")
        workers = [fleet.add({**task, "role": "receiver"}) for _ in range(receivers)]
        for worker in workers:
            worker.expect("ready")
        started = time.monotonic()
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
        return Round(last - started, sent, progress, sum(message["bytes_again"] for message in done))


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


@click.command()
@click.option("--receivers", type=click.IntRange(1), default=8, show_default=True, help="How many receive at once.")
@click.option("--megabytes", type=click.IntRange(1), default=96, show_default=True, help="Size of the model, MiB.")
@click.option(
    "--megabits",
    type=click.FloatRange(0, min_open=True),
    default=80.0,
    show_default=True,
    help="Rate of every link, each way, Mbit/s.",
)
@click.option(
    "--chunk-mib", type=click.FloatRange(0, min_open=True), default=0.5, show_default=True, help="Size of a chunk, MiB."
)
@click.option("--strategy", "strategies", multiple=True, type=click.Choice(["star", "doubling", "swarm"]))
@click.option("--plot", "plot_file", type=NewFile(), help="Draw progress here.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(
    receivers: int,
    megabytes: int,
    megabits: float,
    chunk_mib: float,
    strategies: tuple[str, ...],
    plot_file: Path | None,
    as_json: bool,
) -> None:
    """Fan-out of a model from one seed over shaped links (needs root: network namespaces)."""
    if os.geteuid() != 0:
        raise click.ClickException("fanout makes network namespaces, which only root may")
    single = fan_out(1, "swarm", megabytes, megabits, chunk_mib)
    model_bytes = megabytes * MIB
    click.echo(f"1 receiver: {single.seconds:.2f} s", err=True)
    rounds: dict[str, Round] = {}
    figures: dict[str, Any] = {"t1_seconds": round(single.seconds, 3)}
    names = {"star": f"star_t{receivers}_over_t1", "doubling": f"doubling_t{receivers}_over_t1"}
    for strategy in strategies or ("star", "doubling", "swarm"):
        result = rounds[strategy] = fan_out(receivers, strategy, megabytes, megabits, chunk_mib)
        figures[names.get(strategy, f"t{receivers}_over_t1")] = round(result.seconds / single.seconds, 3)
        if strategy == "swarm":
            figures["seed_sent_over_model"] = round(result.sent_bytes[0] / model_bytes, 3)
            figures["most_sent_by_a_receiver_over_model"] = round(max(result.sent_bytes[1:]) / model_bytes, 3)
            figures["bytes_again_over_model"] = round(result.bytes_again / model_bytes, 4)
        click.echo(
            f"{receivers} receivers, {strategy}: {result.seconds:.2f} s, "
            f"{result.seconds / single.seconds:.2f} x one; sent, seed first, in models: "
            + " ".join(f"{count / model_bytes:.2f}" for count in result.sent_bytes),
            err=True,
        )
    if plot_file is not None:
        plot(rounds, model_bytes, plot_file)
    if as_json:
        settings = {"receivers": receivers, "megabytes": megabytes, "megabits": megabits, "chunk_mib": chunk_mib}
        json.dump(document("fanout", figures, settings=settings), sys.stdout)
        sys.stdout.write("\n")
    else:
        for name, value in figures.items():
            click.echo(f"{name:36} {value}")


if __name__ == "__main__":
    command()

"""`mx bench cluster --hosts FILE`: a cluster's links, and the product on them, from one machine over ssh.

FILE has a machine a line: NAME [ssh=[USER@]HOST] [python=PATH] [address=WHAT OTHERS CALL], or agent=HOST:PORT instead
of ssh= where `mx bench peer --listen` runs. Nothing but this package is needed there. Steps: what the machines are;
plain connections between all pairs; fan-out of a model from the first machine to 1, 2, 4, … and all others (ours, then
doubling and a star); all start at once without a copy, so that one reads storage; an update of all to the next
version; a worker killed at half. Each step's
raw JSON is in the folder of the run; a run that was cut goes on with the same command. `mx bench report FOLDER` makes a
page of it, `mx bench compare` compares two.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import click

from mxbench.cluster.cluster import Asked, Cluster
from mxbench.cluster.hosts_file import HostLine, read_hosts
from mxbench.cluster.manifest import manifest
from mxbench.cluster.run_folder import RunFolder
from mxbench.cluster.steps import STRATEGIES, steps_of
from mxbench.cluster.verdict import figures_of, verdict
from mxbench.hosts import HostError
from mxbench.peer import TRANSPORTS
from mxbench.results import document, json_option, mib_option

MIB = 1 << 20
_POSITIVE = click.FloatRange(0, min_open=True)


@click.command("cluster")
@click.option(
    "--hosts", "hosts_file", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="The machines."
)
@click.option("--run", "run", type=click.Path(file_okay=False, path_type=Path), help="Folder (default: mx-bench-NOW).")
@mib_option(1024, "Size of the model.")
@click.option("--chunk-mib", type=_POSITIVE, default=16.0, show_default=True, help="Size of a chunk.")
@click.option("--transport", type=click.Choice(["auto", *TRANSPORTS]), default="auto", show_default=True)
@click.option("--connections", type=click.IntRange(1, 64), default=4, show_default=True, help="Between a pair.")
@click.option("--seconds", type=_POSITIVE, default=2.0, show_default=True, help="How long a pair's connections send.")
@click.option("--strategy", "strategies", multiple=True, type=click.Choice(STRATEGIES), help="Default: all.")
@click.option("--folder", default="", help="On every machine: where storage is read from (default: temporary files).")
@click.option("--step-seconds", type=_POSITIVE, default=900.0, show_default=True, help="The most that a step may take.")
@click.option("--limit-seconds", type=_POSITIVE, help="Then no further step begins; the same command goes on later.")
@click.option("--ssh-config", type=click.Path(exists=True, dir_okay=False), help="ssh's -F.")
@click.option("--manifest", "as_manifest", is_flag=True, help="Print a Kubernetes Job that does the same, and end.")
@click.option("--image", default="mx-modelexpress:0.1.0", show_default=True, help="Of the manifest's pods.")
@click.option("--count", type=click.IntRange(2), default=4, show_default=True, help="Pods of the manifest.")
@json_option
def command(
    hosts_file: Path | None,
    run: Path | None,
    mib: int,
    chunk_mib: float,
    transport: str,
    connections: int,
    seconds: float,
    strategies: tuple[str, ...],
    folder: str,
    step_seconds: float,
    limit_seconds: float | None,
    ssh_config: str | None,
    as_manifest: bool,
    image: str,
    count: int,
    as_json: bool,
) -> None:
    """The links of a cluster and the product on them, over ssh; --manifest for Kubernetes."""
    if as_manifest:
        words = ["--mib", mib, "--chunk-mib", chunk_mib, "--transport", transport, "--connections", connections]
        words += ["--seconds", seconds, *(word for name in strategies for word in ("--strategy", name)), "--json"]
        limit = int(limit_seconds or 12 * step_seconds)
        click.echo(manifest("mx-bench", image, count, mib * MIB, limit, [str(word) for word in words]), nl=False)
        return
    if hosts_file is None:
        raise click.UsageError("give --hosts FILE, or --manifest")
    lines = read_hosts(hosts_file)
    asked = Asked(mib * MIB, int(chunk_mib * MIB), transport, connections, seconds, folder)
    settings = {**asked._asdict(), "strategies": list(strategies or STRATEGIES)}
    place = run or Path(f"mx-bench-{time.strftime('%Y%m%d-%H%M%S')}")
    kept = RunFolder(place, {**settings, "hosts": [line._asdict() for line in lines]})
    bench = _Bench(kept, lines, asked, step_seconds, ssh_config)
    told = bench.run(settings, limit_seconds)
    if as_json:
        click.echo(json.dumps(told))
    else:
        for name, value in told["figures"].items():
            click.echo(f"{name:32} {value:.4f}")
        click.echo(f"{place}: `mx bench report {place}` makes a page of it")
        for line in told["verdict"]:
            click.echo(line)
    sys.exit(1 if told["failed"] or told["not_begun"] else 0)


class _Bench:
    """One run."""

    def __init__(
        self, kept: RunFolder, lines: list[HostLine], asked: Asked, step_seconds: float, ssh_config: str | None
    ) -> None:
        self._kept, self._lines, self._asked = kept, lines, asked
        self._step_seconds, self._ssh_config = step_seconds, ssh_config

    def run(self, settings: dict[str, Any], limit_seconds: float | None) -> dict[str, Any]:
        """Every step that is not there yet; the document of the whole."""
        began = time.monotonic()
        found: dict[str, dict[str, Any]] = {}
        failed: list[str] = []
        not_begun: list[str] = []
        for number, step in enumerate(steps_of(len(self._lines), settings["strategies"])):
            name = f"{number:02}-{step.name}"
            told = self._kept.step(name)
            if told is None and limit_seconds is not None and time.monotonic() - began > limit_seconds:
                not_begun.append(step.name)
                continue
            if told is None:
                click.echo(f"{step.name} …", err=True)
                try:
                    with Cluster(self._lines, self._asked, self._step_seconds, self._ssh_config) as cluster:
                        made = step.run(cluster)
                except HostError as error:
                    click.echo(f"{step.name} failed: {error}", err=True)
                    self._kept.failed(name, str(error))
                    failed.append(step.name)
                    continue
                figures = {key: round(value, 6) for key, value in made.pop("figures").items()}
                told = document("cluster", figures, settings=settings, step=step.name, **made)
                self._kept.keep(name, told)
            found[step.name] = told
        return self._finished(found, failed, not_begun, settings)

    def _finished(
        self, found: dict[str, dict[str, Any]], failed: list[str], not_begun: list[str], settings: dict[str, Any]
    ) -> dict[str, Any]:
        told = document(
            "cluster",
            figures_of(found),
            settings=settings,
            hosts=found.get("machines", {}).get("hosts", {}),
            failed=failed,
            not_begun=not_begun,
            verdict=list(verdict(found, failed)),
        )
        self._kept.finish(told)
        return told

"""`mx bench object`: a checkpoint from S3 into memory, ours against Run:ai's streamer alone and boto3.

The server is rclone, over HTTP with real signatures, behind a proxy that adds latency, cuts connections, and turns
rclone's 200 for ranges into 206. Every candidate runs in a fresh process, in turns, with the same time-outs; every
tensor's digest is compared. Ratios are of medians of one run. `fetched_over_model` is the bytes through the proxy over
the size of the checkpoint's files, in all our runs, including those in which one or all connections are cut.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click

from mxbench.needs import need_packages, need_rclone
from mxbench.results import document, json_option, rounds_option

MIB = 1024 * 1024
URI = "s3://models/bench"
RUN_SECONDS = 600
CUT_ONE = "ours, one connection cut"
CUT_ALL = "ours, all connections cut"
TIMEOUTS = {"RUNAI_STREAMER_S3_REQUEST_TIMEOUT_MS": "60000", "RUNAI_STREAMER_S3_LOW_SPEED_LIMIT": "1"}  # its own: 1 s


@click.command("object")
@click.option("--size-mib", type=click.IntRange(1), default=512, show_default=True, help="Size of the checkpoint.")
@rounds_option(3, "Loads of each candidate and latency.")
@click.option(
    "--latency-ms", type=click.FloatRange(0), default=20.0, show_default=True, help="Added to each request, beside 0."
)
@json_option
def command(size_mib: int, rounds: int, latency_ms: float, as_json: bool) -> None:
    """S3 into memory, with and without latency, against Run:ai alone and boto3."""
    need_packages("torch", "boto3", "obstore", "runai_model_streamer_s3")
    need_rclone()
    from mxbench.load import made
    from mxbench.stand_ins.s3_server import S3Server, environment

    with tempfile.TemporaryDirectory(prefix="mx-bench-object-") as place:
        folder = Path(place) / "s3" / "models" / "bench"
        folder.mkdir(parents=True)
        made.checkpoint(folder, size_mib * MIB)
        total_bytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        with S3Server(folder.parents[1], changing=False) as server, _proxy(server.own_address) as proxy:
            runs = _measure(proxy, environment(proxy.address), total_bytes, rounds, latency_ms)
    figures = _figures(runs, total_bytes)
    if as_json:
        told = document(
            "object",
            {name: round(value, 4) for name, value in figures.items()},
            settings={"size_mib": size_mib, "rounds": rounds, "latency_ms": latency_ms},
            samples=_samples(runs, total_bytes),
            size_bytes=total_bytes,
            rounds=rounds,
            latency_ms=latency_ms,
            cores=len(os.sched_getaffinity(0)),
            load_average=os.getloadavg(),
            runs=runs,
        )
        click.echo(json.dumps(told))
        return
    for name, value in figures.items():
        click.echo(f"{name:28} {value:.3f}")


def _proxy(address: str) -> Any:
    from mxbench.stand_ins.tcp_proxy import TcpProxy

    return TcpProxy(address, ranges_are_partial=True)


def _measure(
    proxy: Any, environ: dict[str, str], total_bytes: int, rounds: int, latency_ms: float
) -> list[dict[str, Any]]:
    """One row a load; raises click.ClickException when a candidate fails or has other bytes than the others."""
    from mxbench.object_store.candidates import CANDIDATES

    names = list(CANDIDATES)
    runs: list[dict[str, Any]] = []
    digests: dict[str, int] = {}

    def run(name: str, latency: float) -> None:
        nonlocal digests
        click.echo(f"\r{latency:g} ms, {name:30}", err=True, nl=False)
        before = proxy.answered_bytes
        candidate = "ours" if name in (CUT_ONE, CUT_ALL) else name
        ran = subprocess.run(
            [sys.executable, "-m", "mxbench.object_store.candidates", candidate, URI],
            env={**os.environ, "RUNAI_STREAMER_S3_USE_VIRTUAL_ADDRESSING": "0", **TIMEOUTS, **environ},
            capture_output=True,
            text=True,
            timeout=RUN_SECONDS,
            check=False,
        )
        if ran.returncode:
            raise click.ClickException(f"{name}: {ran.stderr.strip().splitlines()[-1:]}")
        told = json.loads(ran.stdout.splitlines()[-1])
        digests = digests or told["digests"]
        if told["digests"] != digests:
            raise click.ClickException(f"{name} has other bytes than {runs[0]['name']}")
        fetched = proxy.answered_bytes - before
        times = {key: told[key] for key in ("seconds", "cpu_seconds")}
        runs.append({"name": name, "latency_ms": latency, **times, "fetched_bytes": fetched})

    run("runai", 0.0)  # the server digests every object once
    runs.clear()
    for latency in sorted({0.0, latency_ms}):
        proxy.latency_seconds = latency / 1000
        for number in range(rounds):
            for name in names[number % len(names) :] + names[: number % len(names)]:  # nobody is always first
                run(name, latency)
    proxy.latency_seconds = 0.0
    for name in (CUT_ONE, CUT_ALL):
        cuts = proxy.cuts
        proxy.cut_after(total_bytes // 2, only_one=name == CUT_ONE)
        run(name, 0.0)
        if proxy.cuts != cuts + 1:
            raise click.ClickException("no connection was cut")
    click.echo(f"\r{'':50}\r", err=True, nl=False)
    return runs


def _samples(runs: list[dict[str, Any]], total_bytes: int) -> dict[str, list[float]]:
    """What each round gave, of the figures that are rates."""
    samples: dict[str, list[float]] = {}
    for run in runs:
        if run["name"] not in (CUT_ONE, CUT_ALL):
            name = f"{run['name']}_{run['latency_ms']:g}ms_gbps"
            samples.setdefault(name, []).append(total_bytes / run["seconds"] / 1e9)
    return samples


def _figures(runs: list[dict[str, Any]], total_bytes: int) -> dict[str, float]:
    figures: dict[str, float] = {}
    vs_runai: list[float] = []
    for latency in sorted({run["latency_ms"] for run in runs}):
        medians: dict[str, float] = {}
        for name in {run["name"] for run in runs} - {CUT_ONE, CUT_ALL}:
            seconds = [run["seconds"] for run in runs if (run["name"], run["latency_ms"]) == (name, latency)]
            medians[name] = statistics.median(seconds)
        for name in sorted(medians):
            figures[f"{name}_{latency:g}ms_gbps"] = total_bytes / medians[name] / 1e9
        for other in ("runai", "boto3"):
            figures[f"vs_{other}_{latency:g}ms"] = medians[other] / medians["ours"]
        figures[f"stream_vs_runai_{latency:g}ms"] = medians["runai"] / medians["ours_stream"]
        vs_runai.append(medians["runai"] / medians["ours"])
    figures["vs_runai"] = min(vs_runai)
    for name in ("ours", "runai", "boto3"):
        burnt = statistics.median(run["cpu_seconds"] for run in runs if run["name"] == name)
        figures[f"{name}_cpu_seconds_per_gb"] = burnt / total_bytes * 1e9
    ours = [run["fetched_bytes"] / total_bytes for run in runs if run["name"].startswith("ours")]
    figures["fetched_over_model"] = max(ours)
    figures["fetched_over_model_after_cut"] = max(
        run["fetched_bytes"] / total_bytes for run in runs if run["name"] in (CUT_ONE, CUT_ALL)
    )
    return figures


if __name__ == "__main__":
    sys.exit(command())

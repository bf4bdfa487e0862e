"""`mx bench vllm`: seconds of a load in a real vLLM by step, against vLLM's default loader and a plain copy.

Two processes with vLLM's CPU build and a server. For each model of the demo: the default loader; `mx` from storage in
one process; `mx` from that worker in the other, while the weight files are moved away. Building and processing the
model are the engine's steps; the bytes alone are timed as a copy within memory. What is left of the load is ours:
`own_seconds`. The first round warms each process up and does not count; then the best of the rounds.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from mxbench.demo import models
from mxbench.demo.processes import files_away
from mxbench.demo.workers import Server
from mxbench.results import document, json_option, rounds_option

STEPS = ("join", "build", "fill", "process", "keep", "offer")
ENGINE_STEPS = ("build", "process")
CASES: dict[str, tuple[Callable[[Path], Path], dict[str, Any]]] = {
    "minilm": (models.minilm, {"runner": "pooling"}),
    "qwen3": (models.qwen3, {}),
}


def copy_seconds(total_bytes: int) -> float:
    """Seconds to copy this many bytes within memory, best of five: no loader is faster."""
    source, target = bytearray(total_bytes), bytearray(total_bytes)
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        target[:] = source
        best = min(best, time.perf_counter() - began)
    return best


def measure(rounds: int, say: Callable[[str], None]) -> dict[str, dict[str, dict[str, float]]]:
    """Model → default, storage, p2p → seconds by step, with `total`, `bytes` (seconds of a copy) and `own`."""
    from tests.vllm.engines import EngineHost

    measured: dict[str, dict[str, dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        server = Server(folder)
        hosts = []
        try:
            address = server.start()
            hosts = [EngineHost(name, folder, address, stock=True) for name in ("source", "target")]
            source, target = hosts
            for name, (make, options) in CASES.items():
                model = make(folder / "models" / name)
                best: dict[str, dict[str, float]] = {}
                for number in range(rounds + 1):
                    say(f"{name}: round {number} of {rounds}")
                    found = one_round(source, target, model, options)
                    for way, steps in found.items() if number else ():
                        best[way] = min(best.get(way, steps), steps, key=lambda steps: steps["own"])
                measured[name] = best
        finally:
            for host in hosts:
                host.close()
            server.child.stop()
    return measured


def one_round(source: Any, target: Any, model: Path, options: dict[str, Any]) -> dict[str, dict[str, float]]:
    """The three loads of one model; raises ClickException unless all engines answer the same."""
    default = source.load(model, "auto", **options)
    first = source.load(model, **options)
    with files_away(models.weight_files(model)):
        second = target.load(model, **options)
    if not default.answers == first.answers == second.answers or second.report["path"] != "p2p":
        raise click.ClickException(f"{model.name}: answers differ, or its weights did not come from the worker")
    bytes_seconds = copy_seconds(first.report["bytes"])
    steps = {"total": sum(default.default_steps.values()), **default.default_steps}
    found = {"default": with_own(steps, bytes_seconds)}
    for way, report in (("storage", first.report), ("p2p", second.report)):
        found[way] = with_own({"total": report["load_seconds"], **report["steps"]}, bytes_seconds)
    for host in (source, target):
        host.ask("leave")
    return found


def with_own(steps: dict[str, float], bytes_seconds: float) -> dict[str, float]:
    """Adds `own`: what a loader needs beyond the engine's own steps and the copy of bytes."""
    engine = sum(steps.get(step, 0.0) for step in ENGINE_STEPS)
    return {**steps, "bytes": bytes_seconds, "own": max(0.0, steps["total"] - engine - bytes_seconds)}


def figures_of(measured: dict[str, dict[str, dict[str, float]]]) -> dict[str, float]:
    """`own_seconds` is that of the slowest model by p2p; the rest by model and way."""
    figures = {"own_seconds": max(ways["p2p"]["own"] for ways in measured.values())}
    for name, ways in measured.items():
        for way, steps in ways.items():
            figures |= {f"{name}_{way}_{part}_seconds": steps[part] for part in ("total", "own")}
        figures[f"{name}_bytes_seconds"] = ways["p2p"]["bytes"]
    return {name: round(seconds, 4) for name, seconds in figures.items()}


def table(measured: dict[str, dict[str, dict[str, float]]]) -> str:
    """For people."""
    columns = ("total", *STEPS, "bytes", "own")
    lines = ["model   way      " + "".join(f"{column:>9}" for column in columns)]
    for name, ways in measured.items():
        for way, steps in ways.items():
            cells = "".join(f"{steps[column]:9.3f}" if column in steps else f"{'-':>9}" for column in columns)
            lines.append(f"{name:<7} {way:<8} {cells}")
    return "\n".join(lines)


@click.command()
@rounds_option(2, "Rounds that count.", most=20)
@json_option
def command(rounds: int, as_json: bool) -> None:
    """Seconds of a load in vLLM by step: mx, the default loader, nothing but bytes."""
    measured = measure(rounds, lambda text: print(text, file=sys.stderr, flush=True))
    if as_json:
        told = document("vllm", figures_of(measured), settings={"rounds": rounds}, steps=measured)
        click.echo(json.dumps(told, indent=2))
    else:
        click.echo(table(measured))
        click.echo(f"own_seconds {figures_of(measured)['own_seconds']:.3f} (all but the engine's steps and the bytes)")

"""The main job, shown: worker A loads from storage, worker B takes its weights from A, the answers are compared.

For each model real `vllm serve` processes: vLLM's default loader, worker A with `--load-format mx`, and, while the
checkpoint's weight files are moved away, worker B with `--load-format mx`, which only A can give its weights. One
model also with the fixed roles `mx-source` and `mx-target`, one with two workers each (TP 2). Then a model of 1 GB in
an object store behind a slow link (far_storage). Exit code 0 only if every answer equals that of vLLM's default loader
in every bit, and whoever pulls got its weights by p2p.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from mxbench.demo import far_storage, models
from mxbench.demo.processes import DemoError, bring_back, cancelled, files_away
from mxbench.demo.workers import Server, Worker

FOLDER = Path(".demo").absolute()
COLUMNS = ("model", "worker", "weights from", "tensors", "bytes", "verified chunks", "equal")
FAR_COLUMNS = ("model", "worker", "weights from", "bytes", "seconds", "GB/s")


class Start(NamedTuple):
    """One worker: its name in the table and its load format."""

    worker: str
    load_format: str


MX_PAIR = (Start("A", "mx"), Start("B", "mx"))


class Case(NamedTuple):
    """One model of the demo. `ranks` is the tensor-parallel size; `pairs` are who gives and who takes, in turn."""

    name: str
    make: Callable[[Path], Path]
    pooling: bool = False
    ranks: int = 1
    pairs: tuple[tuple[Start, Start], ...] = (MX_PAIR,)


CASES = (
    Case(
        "qwen3-generated", models.qwen3, pairs=(MX_PAIR, (Start("source", "mx-source"), Start("target", "mx-target")))
    ),
    Case("all-MiniLM-L6-v2", models.minilm, pooling=True),
    Case("qwen3-generated-tp2", models.qwen3, ranks=2),
)
AT_ONCE = 2  # cases; more start no faster on two cores


class Progress:
    """Lines on stderr with the time since the start; from any thread."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._lock = threading.Lock()

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self._started

    def __call__(self, text: str) -> None:
        with self._lock:
            print(f"[{self.seconds:5.1f} s] {text}", file=sys.stderr, flush=True)


def run_case(case: Case, server: str, say: Progress) -> dict[str, Any]:
    """All workers of one model; the result is what --json prints for it. Raises DemoError."""
    bring_back(FOLDER / "models" / case.name)
    model = case.make(FOLDER / "models" / case.name)

    def start(stack: ExitStack, worker: str, load_format: str) -> Worker:
        say(f"{case.name}: {worker} starts (--load-format {load_format})")
        name = f"{case.name}-{worker.replace(' ', '-')}"
        url = None if load_format == "auto" else server
        started = Worker(
            name, model, FOLDER, load_format=load_format, pooling=case.pooling, server=url, ranks=case.ranks
        )
        stack.callback(started.child.stop)
        started.start()
        path = started.report().get("path", "storage")
        say(f"{case.name}: {worker} is ready, its weights came by {path}")
        return started

    with ExitStack() as stack:
        reference = start(stack, "default loader", "auto")
        expected = reference.answers()
        reference.child.stop()
    rows: list[dict[str, Any]] = []
    for giver, taker in case.pairs:
        with ExitStack() as stack:
            first = start(stack, f"worker {giver.worker}", giver.load_format)
            answers = first.answers()
            with files_away(models.weight_files(model)):
                second = start(stack, f"worker {taker.worker}", taker.load_format)
                answers_of_second = second.answers()
            rows.append({"worker": giver.worker, "equal": answers == expected, **first.report()})
            rows.append({"worker": taker.worker, "equal": answers_of_second == expected, **second.report()})
    equal = all(row["equal"] for row in rows)
    say(f"{case.name}: answers {'equal' if equal else 'DIFFER FROM'} those of vLLM's default loader")
    path = "p2p" if all(row.get("path") == "p2p" for row in rows[1::2]) else "storage"
    return {"name": case.name, "equal": equal, "path": path, "workers": rows}


def run(say: Progress) -> dict[str, Any]:
    """The whole demo. Raises DemoError."""
    with ExitStack() as stack:
        server = Server(FOLDER)
        stack.callback(server.child.stop)
        address = server.start()
        say(f"mxserver listens on {address}")
        pool = stack.enter_context(ThreadPoolExecutor(AT_ONCE))
        stack.callback(cancelled.set)  # before the pool waits for its threads
        results = list(pool.map(lambda case: run_case(case, address, say), CASES))
        far = far_storage.run(FOLDER, say)
    from_peers = [result["path"] == "p2p" for result in results]
    if "left_out" not in far:
        from_peers.append(far["workers"][1].get("path") == "p2p")
    return {
        "equal": all(result["equal"] for result in results) and far.get("equal", True),
        "path": "p2p" if all(from_peers) else "storage",
        "seconds": round(say.seconds, 1),
        "models": results,
        "far_storage": far,
    }


def table(result: dict[str, Any]) -> str:
    """The result for people."""
    rows = [
        (
            model["name"],
            worker["worker"],
            _giver(worker, model["workers"]),
            str(worker.get("tensors", 0)),
            f"{worker.get('bytes', 0):,}",
            str(worker.get("chunks_verified", 0)),
            "yes" if worker["equal"] else "NO",
        )
        for model in result["models"]
        for worker in model["workers"]
    ]
    return _aligned(COLUMNS, rows)


def far_table(far: dict[str, Any]) -> str:
    """The model behind the slow link, for people."""
    if reason := far.get("left_out"):
        return f"Left out: a model of 1 GB behind a slow link ({reason})."
    rows = [
        (
            far["name"],
            worker["worker"],
            _giver(worker, far["workers"]),
            f"{worker['bytes']:,}",
            f"{worker['seconds']:.1f}",
            f"{worker['gigabytes_per_second']:.3f}",
        )
        for worker in far["workers"]
    ]
    store, worker = far["store_megabits"] / 8000, far["worker_megabits"] / 8000
    return (
        f"{_aligned(FAR_COLUMNS, rows)}\nThe store's link carries {store:.3f} GB/s, a worker's {worker:.3f}: from the "
        f"worker they came in 1/{far['peer_over_storage']:.1f} of the time."
    )


def _giver(worker: dict[str, Any], workers: list[dict[str, Any]]) -> str:
    """Who gave this worker its weights: storage, or another row's worker."""
    if worker.get("path") != "p2p":
        path: str = worker.get("path", "?")
        return {"uri": "object store"}.get(path, path)
    givers = {offer["worker_id"]: other["worker"] for other in workers for offer in other.get("offers", ())}
    return f"worker {givers.get(worker['source_worker'], '?')}"


def _aligned(columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(len(row[column]) for row in (columns, *rows)) for column in range(len(columns))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (columns, *rows)]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(line.rstrip() for line in lines)


def main() -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m mxbench.demo", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that children are ended and files moved back
    say = Progress()
    try:
        result = run(say)
    except (DemoError, OSError) as error:
        print(f"demo: {error}", file=sys.stderr)
        if arguments.json:
            print(json.dumps({"equal": False, "path": "", "error": str(error), "models": []}, indent=2))
        return 1
    passed = result["equal"] and result["path"] == "p2p"
    if arguments.json:
        print(json.dumps(result, indent=2))
    else:
        print(f"{table(result)}\n\n{far_table(result['far_storage'])}\n")
        verdict = (
            "whoever pulls got its weights from a worker, and every answer is equal"
            if passed
            else "NOT as it should be"
        )
        print(f"{verdict} ({result['seconds']} s; logs in {FOLDER / 'logs'})")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())

"""Runs the steps within a budget of seconds, one after the other; each one's result is on disk before the next begins.

python -m tools.gpu_vllm.runner SETTINGS   with one JSON object; `tools.gpu_vllm` starts it with the right packages.
"""

from __future__ import annotations

import contextlib
import json
import sys
import threading
import time
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tools.gpu_vllm.engines import Engines, engines
from tools.gpu_vllm.journal import Journal
from tools.gpu_vllm.machine import Machine
from tools.gpu_vllm.steps import STEPS, Run, Step

ERROR_CHARACTERS = 6000
CPU_PATIENCE = 4.0  # times as long as on a GPU machine, whose cores are more


class Settings(NamedTuple):
    """`seconds` is the budget; `folder` is for everything that is made, `out` for what shall be kept."""

    gpu: bool
    seconds: float
    folder: str
    out: str
    tiny: str
    stand_in: str | None = None
    peers: str | None = None
    steps: tuple[str, ...] = tuple(STEPS)
    about: dict[str, Any] = {}  # noqa: RUF012 - never written to

    @property
    def machine(self) -> Machine:
        """What it runs on."""
        stand_in, peers = (Path(path) if path else None for path in (self.stand_in, self.peers))
        return Machine(self.gpu, stand_in, peers)


@contextlib.contextmanager
def cut_after(seconds: float, running: Engines) -> Iterator[threading.Event]:
    """Kills the engines when the time is over; the event says so."""
    over = threading.Event()

    def cut() -> None:
        over.set()
        running.cut()

    timer = threading.Timer(seconds, cut)
    timer.start()
    try:
        yield over
    finally:
        timer.cancel()
        timer.join()


def run_step(name: str, step: Step, run: Run, journal: Journal, left_seconds: float) -> bool:
    """One step and its result; whether it came to an end."""
    patience = 1.0 if run.machine.gpu else CPU_PATIENCE
    limit = min(patience * step.most_seconds, left_seconds)
    began = time.monotonic()
    said: dict[str, Any]
    with cut_after(limit, run.engines) as over:
        try:
            found, wrong = step.run(run)
            said = {"ok": not wrong, "wrong": wrong, "found": found}
        except Exception as error:  # noqa: BLE001 - whatever it is, the other steps come all the same
            traceback.print_exc()
            late = f"cut after {limit:.0f} s: " if over.is_set() else ""
            said = {"error": f"{late}{type(error).__name__}: {error}"[-ERROR_CHARACTERS:]}
    journal.add(name, took_seconds=round(time.monotonic() - began, 2), **said)
    ended = "error" not in said
    all_go = not ended or over.is_set()  # of a cut none is left, even where the step did not need it
    logs = run.engines.end(*(() if all_go else step.ends)) if step.ends or all_go else []
    journal.keep_logs(logs)
    return ended


def run_steps(names: Iterable[str], run: Run, journal: Journal, seconds: float) -> None:
    """All of them; those for which there is no time, or nothing to build on, are told as skipped."""
    ended: set[str] = set()
    for name in names:
        step = STEPS[name]
        left = seconds - journal.seconds
        if step.needs and step.needs not in ended:
            journal.add(name, skipped=f"{step.needs} did not come to an end")
        elif left < step.least_seconds:
            journal.add(name, skipped=f"{left:.0f} s are left, it wants {step.least_seconds:.0f}")
        elif run_step(name, step, run, journal, left):
            ended.add(name)
        print(journal.table().splitlines()[-1], flush=True)


def run_all(settings: Settings) -> int:
    """Everything; returns the exit code: 0 if all that was asked for ran, and is as it should be."""
    folder = Path(settings.folder)
    journal = Journal(Path(settings.out))
    machine = settings.machine
    journal.add("about", gpu=machine.gpu, instead=machine.counterparts, **settings.about)
    with engines(machine, folder) as running:
        run = Run(machine, running, folder, Path(settings.tiny), folder / "models" / "large")
        run_steps(settings.steps, run, journal, settings.seconds)
        journal.keep_logs(running.close())
    good = [row for row in journal.rows if row.get("ok")]
    print(f"{len(good)} of {len(settings.steps)} steps are as they should be, {journal.seconds:.0f} s")
    return 0 if len(good) == len(settings.steps) else 1


def main() -> None:
    """One run."""
    given = json.loads(sys.argv[1])
    sys.exit(run_all(Settings(**{**given, "steps": tuple(given.get("steps") or STEPS)})))


if __name__ == "__main__":
    main()

"""The hostile clients of `make test-adversary`, one after the other, as figures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from mxbench.needs import ROOT


class Attack(NamedTuple):
    """What honest workers saw of a server under one hostile client, during it and after it."""

    name: str
    p99_seconds: float  # the worse of heartbeats and listings
    machine_p99_seconds: float  # of calls to a server of a few lines that nobody attacks
    rss_mib: float
    failures: dict[str, int]  # heartbeats, listings and probes that failed, or workers that went STALE


def attacks_on(place: Path, store: str, attack_seconds: float) -> list[Attack]:
    """Runs them against a server with this store, by the tests' own processes; `place` is an empty folder."""
    figures = place / "figures.jsonl"
    run = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--basetemp={place / 'tests'}"),
            "tests/adversary/test_hostile_clients.py",
        ],
        cwd=ROOT,
        env={**os.environ, "STORE": store, "ATTACK_SECONDS": f"{attack_seconds:g}", "ATTACK_FIGURES": str(figures)},
        capture_output=True,
        text=True,
        check=False,
    )
    if not figures.exists():
        raise RuntimeError(f"no hostile client could be run: {run.stdout[-2000:]}{run.stderr[-2000:]}")
    return [Attack(**json.loads(line)) for line in figures.read_text().splitlines()]

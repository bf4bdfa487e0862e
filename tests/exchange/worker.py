"""A process that publishes or fetches as a line of JSON says; prints what came of it, and stays until its input ends.

One argument, a JSON object: `do` (publish or fetch), `name`, `server`, `settings`, and `seed` or `wait_seconds`. Lines
that it reads while it serves are answered with the bytes that readers were given.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np

from mxcore import MxError, fetch, publish

ROWS = 1024


def arrays(seed: int) -> dict[str, Any]:
    """16 MiB in four arrays."""
    random = np.random.default_rng(seed)
    return {f"layers.{number}": random.integers(0, 2**32, (ROWS, 1024), np.uint32) for number in range(4)}


def say(**values: Any) -> None:
    print(json.dumps(values), flush=True)  # noqa: T201 - read by the test


def main(task: dict[str, Any]) -> None:
    at = {"server": task["server"], "settings": task["settings"]}
    try:
        if task["do"] == "publish":
            done: Any = publish(task["name"], arrays(task["seed"]), 1, **at)
            say(worker=done.worker_id)
        else:
            done = fetch(task["name"], 1, wait_seconds=60, share=True, progress=lambda *now: say(progress=now), **at)
            heavy = [name for name in ("torch", "mxcore.engine") if name in sys.modules]
            sums = {name: int(np.asarray(array).sum(dtype=np.uint64)) for name, array in done.items()}
            say(kind=type(done["layers.0"]).__module__, sums=sums, given=dict(done.report.bytes_from), heavy=heavy)
    except MxError as error:
        say(error=type(error).__name__, message=str(error))
        return
    for _line in sys.stdin:
        say(bytes_given=done.bytes_given)
    done.close()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))

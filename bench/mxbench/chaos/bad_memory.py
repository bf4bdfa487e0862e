"""A bit flips in the memory of a holder that serves: how long until it has noticed by itself?"""

from __future__ import annotations

import random
from dataclasses import dataclass

from mxbench.fleet.fleet import Fleet
from mxbench.hostile.liars import start
from mxbench.transfer.limits import digest_rate

MODEL_BYTES = 256 << 20
SHARE = 0.01  # of a core, as a worker looks at itself
SPARE_SECONDS = 5.0
MOST_TIMES = 20.0  # the limit, before the bench gives up


@dataclass(frozen=True)
class Noticed:
    """The longest time of several flips, and what it may be: a round of all bytes at 1 % of a core, and 5 s more."""

    seconds: float
    limit_seconds: float


def flip_and_wait(flips: int, seed: int) -> Noticed:
    """Flips a bit at a random place, in a new worker each time. Raises FleetError where it is never noticed."""
    chance = random.Random(seed)
    limit = MODEL_BYTES / (SHARE * 1e9 * digest_rate(MODEL_BYTES)) + SPARE_SECONDS
    seconds = []
    with Fleet(server=False) as fleet:
        for _ in range(flips):
            holder = start(fleet, "tcp", role="seed", model_bytes=MODEL_BYTES, chunk_bytes=16 << 20)
            holder.expect("serving")
            holder.send(f"flip {chance.randrange(1 << 62)}")
            flipped_at = holder.expect("flipped")["at"]
            seconds.append(holder.expect("noticed", MOST_TIMES * limit)["at"] - flipped_at)
            holder.end()
    return Noticed(max(seconds), limit)

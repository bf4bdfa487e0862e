"""One lying holder among three: many small receives from all of them, and what the receivers end up with."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mxbench.fleet.fleet import BY_NIXL, Fleet, Process
from mxbench.hostile.worker import LIES

MODULE = "mxbench.hostile.worker"
HOLDERS = 3
BATCH = 20  # receives from the same liar
SHARES = {"tcp": 0.5, "same-host": 0.45, BY_NIXL: 0.05}  # of the receives; agents take their time
TASK = {
    "model": "bench/liars",
    "content": 7,
    "model_bytes": (2 << 20) - 4321,
    "chunk_bytes": 64 << 10,
    "strategy": "star",
    "settings": {"MX_DRAIN_TIMEOUT_SECS": 1, "MX_STALL_TIMEOUT_SECS": 20},  # a busy machine is no stall
}


@dataclass(frozen=True)
class Lied:
    """`receives` in all; of them `wrong` ones, and `by_peers` ended with right weights and without storage."""

    receives: int
    wrong: int
    by_peers: int


def receive_from_liars(count: int, seed: int, shares: Mapping[str, float] = SHARES) -> Lied:
    """Receives `count` times from three holders, one of which lies: another one and in another way each batch.

    None of them looks at its own memory. A receiver has no files: whom it cannot believe it does not take from.
    """
    chance = random.Random(seed)
    outcomes: Counter[str] = Counter()
    with Fleet(server=False) as fleet:
        holders = [start(fleet, "auto", role="seed", looks=False) for _ in range(HOLDERS)]
        sources = [holder.expect("serving")["source"] for holder in holders]
        lied = None
        for transport, share in shares.items():
            receiver = start(fleet, transport, role="receiver")
            receiver.expect("ready")
            left = max(1, round(count * share))
            for batch in range(-(-left // BATCH)):
                if lied is not None:
                    sources[lied] = _serve(holders[lied], "nothing", chance)
                lied = chance.randrange(HOLDERS)
                sources[lied] = _serve(holders[lied], str(batch % len(LIES)), chance)
                outcomes.update(receive(receiver, sources, min(BATCH, left), chance))
                left -= BATCH
            receiver.leave()
    return Lied(sum(outcomes.values()), outcomes["wrong"], outcomes["right"])


def start(fleet: Fleet, transport: str, environ: dict[str, str] | None = None, **task: Any) -> Process:
    """A worker of chaos that no server knows, with a small model unless `task` says otherwise."""
    return fleet.add({**TASK, **task}, transport=transport, environ=environ, module=MODULE)


def receive(
    receiver: Process, sources: list[dict[str, str]], count: int, chance: random.Random, how: str = "whole"
) -> dict[str, int]:
    """So many receives, `whole` or `cancelled`; returns how many ended how."""
    told = json.dumps(sources, separators=(",", ":"))
    receiver.send(f"receive {count} {chance.randrange(1 << 32)} {how} {told}")
    outcomes: dict[str, int] = receiver.expect("received")["outcomes"]
    return outcomes


def _serve(holder: Process, lie: str, chance: random.Random) -> dict[str, str]:
    holder.send(f"lie {lie} {chance.randrange(1 << 32)}")
    source: dict[str, str] = holder.expect("serving")["source"]
    return source

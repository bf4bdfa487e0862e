"""A worker of chaos in a process of its own: one that lies about its weights, or that receives again and again.

Beside what a worker of a fleet is told, it takes the lines below; a holder says `noticed` when it finds its memory bad.
"""

from __future__ import annotations

import json
import logging
import random
import sys
import time
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np

from mxbench.fleet.model_memory import HostMemory, content_pieces
from mxbench.fleet.model_worker import ModelWorker, be, say
from mxcore.errors import TransferError
from mxcore.transfer.move import Source
from mxcore.transfer.serve import SelfCheck

Bytes: TypeAlias = "np.ndarray[Any, np.dtype[np.uint8]]"

LIES = ("before its digests", "after its digests", "all of it")
"""Where a holder's memory is wrong: one bit that its digests vouch for, two that they do not, or other weights."""


class ChaosWorker(ModelWorker):
    """Holds one model for long; what it is told is the methods' names and their arguments."""

    @cached_property
    def right(self) -> Bytes:
        """What every byte should be."""
        pieces = content_pieces(self.task["content"], self.memory.size_bytes)
        return np.frombuffer(b"".join(piece for _, piece in pieces), np.uint8)

    def bytes_there(self) -> Bytes:
        """The model's memory, to be written to."""
        assert isinstance(self.memory, HostMemory)
        return np.frombuffer(self.memory.view, np.uint8)

    @property
    def source(self) -> dict[str, Any]:
        """Where others find this worker."""
        member = self.member
        return {"source_id": member.source_id, "worker_id": member.worker_id, "endpoint": member.endpoint or ""}

    def run(self) -> None:
        """Takes lines until there are no more."""
        if not self.task.get("looks", True):
            SelfCheck.start = lambda self: None  # type: ignore[method-assign] # a liar knows that it lies
        told = {name: getattr(self, name) for name in ("lie", "receive", "flip", "changed", "again", "leases")}
        if self.task["role"] == "seed":
            self.lie("nothing", "0")
        else:
            say(event="ready")
        for line in sys.stdin:
            name, *words = line.split(" ")
            told[name.strip()](*(word.strip() for word in words))

    def lie(self, about: str, seed: str) -> None:
        """Serves anew, with a lie of `LIES` by its number, or `nothing`."""
        self.member.withdraw()
        self.bytes_there()[:] = self.right
        lie = "" if about == "nothing" else LIES[int(about)]
        places = np.random.default_rng(int(seed)).integers(0, 8 * self.memory.size_bytes, 2)
        if lie == LIES[0]:
            self._flip(int(places[0]))
        elif lie == LIES[2]:
            self.bytes_there()[:] ^= 0x5A
        self.member.on_bad_memory = lambda what: say(event="noticed", at=time.monotonic(), what=what)
        self.member.serve(self.layout, self.placement, {}, keep_alive=self.memory)
        if lie == LIES[1]:
            for place in places:
                self._flip(int(place))
        say(event="serving", source=self.source)

    def flip(self, place: str) -> None:
        """Flips one bit of what is served."""
        self._flip(int(place))
        say(event="flipped", at=time.monotonic())

    def changed(self) -> None:
        """How many bytes are not what they should be."""
        say(event="changed", bytes=int(np.count_nonzero(self.bytes_there() != self.right)))

    def leases(self) -> None:
        """How many readers it has."""
        holder = self.member.holder
        say(event="leases", count=holder.live_leases if holder else 0)

    def again(self) -> None:
        """Leaves the fleet, and joins it as another worker."""
        self.member.close()
        self.member = self._joined()
        say(event="ready")

    def receive(self, count: str, seed: str, cancelled: str, sources: str) -> None:
        """Receives so often from these sources, in a random order; or begins to, and gives up in the middle."""
        chance = random.Random(int(seed))
        holders = [Source(worker_rank=0, **each) for each in json.loads(sources)]
        outcomes: Counter[str] = Counter()
        for _ in range(int(count)):
            outcomes[self._receive_once(chance.sample(holders, len(holders)), cancelled == "cancelled", chance)] += 1
        say(event="received", outcomes=outcomes)

    def _receive_once(self, sources: Sequence[Source], cancelled: bool, chance: random.Random) -> str:
        settings = self.member.settings
        self._forget()
        if cancelled:
            self.member.settings = settings.model_copy(update={"transfer_timeout_seconds": chance.uniform(0.001, 0.03)})
        try:
            self.member.receive(self.layout, self.placement, {}, sources)
        except TransferError as error:
            logging.getLogger(__name__).info("refused: %s", error)
            return "cancelled" if cancelled else "refused"
        finally:
            self.member.settings = settings
        return "right" if np.array_equal(self.bytes_there(), self.right) else "wrong"


if __name__ == "__main__":
    be(ChaosWorker)

"""The rungs of the ladder: each fills a model from another place. A rung is made of the frozen context of a load
(`engine.context`), and what it loads is a value (`engine.loaded`). `rungs_of` makes those that a load may try; `Wait`
is for who waits for other workers.
"""

from __future__ import annotations

from mxcore.engine.rungs.choice import rungs_of
from mxcore.engine.rungs.peer import Attempt, FleetRung, PeerRung, Tried
from mxcore.engine.rungs.waiting import Wait, wait_for_ranks

__all__ = ["Attempt", "FleetRung", "PeerRung", "Tried", "Wait", "rungs_of", "wait_for_ranks"]

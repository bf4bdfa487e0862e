"""What this process offers: kept while its engines live, paused while they sleep, left on the way out.

A sleeping engine's weights lie in host memory or nowhere, and the memory that was registered with the network is
unmapped: nobody may be reading there. So readers are waited for (MX_DRAIN_TIMEOUT_SECS), then cut off, before the
engine goes on; and when it is awake again, weights are offered only if every digest is what it was.

Children of `multiprocessing`, as engines' workers are, run no `atexit` functions; `multiprocessing.util.Finalize` runs
in them and at the end of an ordinary process. For those that are killed there is `departure`.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Sequence
from multiprocessing import util
from typing import NamedTuple

from mxcore.engine.departure import Departure, Record
from mxcore.engine.weights import Weights, synchronize
from mxcore.transfer.layout import ChunkDigests
from mxcore.transfer.member import Membership
from mxcore.transfer.serve import Holder, Origin
from mxserver.wire import MxError

__all__ = ["EngineWatch", "Offer", "leave", "stay"]

_log = logging.getLogger(__name__)
_END_SECONDS = 10.0  # after SIGTERM, for an engine that does not end
_lock = threading.Lock()
_offers: list[_Entry] = []
_owner: list[int] = []  # the process that registered the exit function: a fork must not say its parent's goodbye


class Offer:
    """Weights that are served at one membership through an engine's life. Not thread-safe: the engine calls from one.

    The weights must have been looked at (`Weights.layout`). They are held until `close`.
    """

    def __init__(self, membership: Membership, weights: Weights) -> None:
        self.membership = membership
        self._weights: Weights | None = weights
        self._paused: Holder | None = None

    def start(self, digests: ChunkDigests | None = None, origin: Origin | None = None) -> None:
        """Serves; `digests` and `origin` as Membership.serve has them, and so the errors."""
        weights = self._weights
        if weights is not None and weights.layout is not None and weights.placement is not None:
            if self.membership.settings.on_bad_memory == "end":
                self.membership.on_bad_memory = _end_engine
            self.membership.serve(weights.layout, weights.placement, weights.scalars, digests, weights, origin)

    def pause(self) -> bool:
        """Before the memory goes away: new readers are refused, those that read are waited for, within bounds.

        False when some were cut off. Idempotent.
        """
        holder = self.membership.holder
        if holder is None:
            return True
        self._paused = holder
        return self.membership.withdraw()

    def resume(self) -> bool:
        """After the memory came back: serves again if the bytes are those that were served; False if they are not.

        Raises what Membership.serve raises.
        """
        holder, self._paused = self._paused, None
        if holder is None or self._weights is None:
            return self.membership.holder is not None
        synchronize(self._weights.device)
        if not holder.unchanged():
            return False
        self.start(holder.digests, holder.origin)
        return True

    def close(self) -> None:
        """Drains, says goodbye, lets go of the memory. Idempotent; never raises."""
        self.membership.close()
        self._paused = self._weights = None


class _Entry(NamedTuple):
    """An offer; whose weights it has: of which engine, and of which of its models."""

    offer: Offer
    departure: Departure | None
    engine: str
    part: str


def stay(offer: Offer, record: Record, engine: str = "", part: str = "") -> None:
    """Keeps an offer until its engine or this process ends, and sees to its goodbye however that comes.

    `engine` is what `EngineWatch` is told, `part` which of its models it is. Thread-safe.
    """
    try:
        departure = Departure(record)
    except OSError as error:
        _log.warning("nobody will say goodbye for worker %s if it is killed: %s", record.worker_id, error)
        departure = None
    with _lock:
        if os.getpid() not in _owner:
            _offers.clear()
            _owner[:] = [os.getpid()]
            util.Finalize(None, leave, args=("the process ends",), exitpriority=100)
        _offers.append(_Entry(offer, departure, engine, part))


def leave(reason: str, engine: str = "", part: str | None = None) -> int:
    """Ends the offers of an engine, of one of its models, or all of this process; how many. Idempotent, thread-safe,
    never raises."""
    leaving = _of(engine) if part is None else [entry for entry in _of("") if entry[2:] == (engine, part)]
    for entry in leaving:
        _log.info("no longer serving: %s", reason)
        _end(entry)
    return len(leaving)


class EngineWatch:
    """Called around what an engine does to its weights (`Engine.watch`), on the engine's thread."""

    def sleeping(self, engine: str, level: int) -> None:
        """Before the engine sleeps: at level 1 it keeps its weights in host memory, above it drops them."""
        if level > 1:
            leave("the engine sleeps and drops its weights", engine)
            return
        for entry in _of(engine):
            drained = entry.offer.pause()
            _log.info("not serving while the engine sleeps%s", "" if drained else "; readers were cut off")

    def awake(self, engine: str, tags: Sequence[str] | None) -> None:
        """After the engine woke up; `tags` is what of its memory is back; None: all of it."""
        if tags is not None and "weights" not in tags:
            return
        for entry in _of(engine):
            try:
                is_same = entry.offer.resume()
            except MxError as error:
                _log.warning("serving again after sleep failed: %s", error)
                is_same = False
            if is_same:
                _log.info("the engine is awake and its weights are what they were: serving again")
                continue
            _log.warning("the engine is awake, but its weights are not what was served: no longer serving")
            _end(entry)

    def changing(self, engine: str, what: str) -> None:
        """Before weights are written to."""
        leave(f"the engine's weights are changed ({what})", engine)

    def ending(self, engine: str) -> None:
        """Before the engine gives its memory back."""
        leave("the engine ends", engine)


def _end_engine(what: str) -> None:
    """MX_ON_BAD_MEMORY=end: what ends this process ends its engine. Returns at once."""
    _log.critical("MX_ON_BAD_MEMORY=end, so this engine ends: %s", what)
    killing = threading.Timer(_END_SECONDS, os.kill, (os.getpid(), signal.SIGKILL))
    killing.daemon = True
    killing.start()
    os.kill(os.getpid(), signal.SIGTERM)


def _of(engine: str) -> list[_Entry]:
    """What an engine offers, and what is offered for an engine that is not known: rather too little is served than what
    is gone. For "", an engine that is not known itself, that is everything. Never what another known engine offers."""
    with _lock:
        present = list(_offers) if os.getpid() in _owner else []
    return [entry for entry in present if engine == "" or entry.engine in (engine, "")]


def _end(entry: _Entry) -> None:
    with _lock:
        if entry not in _offers:
            return
        _offers.remove(entry)
    entry.offer.close()
    if entry.departure is not None:
        entry.departure.revoke()

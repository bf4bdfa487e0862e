"""What this process offers: kept while its engines live, paused while they sleep, left on the way out.

vLLM's engine core and workers are children of `multiprocessing`, which run no `atexit` functions;
`multiprocessing.util.Finalize` runs in them and at the end of an ordinary process. For those that are killed there is
`vllm_plugin.last_will`.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Sequence
from multiprocessing import util
from typing import Protocol

from mxserver.wire.errors import MxError
from vllm_plugin.last_will import LastWill, Record

_log = logging.getLogger(__name__)
_lock = threading.Lock()
_members: list[tuple[Member, LastWill | None, str]] = []  # the last one names the engine whose weights these are
_owner: list[int] = []  # the process that registered the exit function: a fork must not say its parent's goodbye


class Member(Protocol):
    """What can be paused and left."""

    def pause(self) -> bool:
        """Serves nothing for a while; False when readers were cut off. Idempotent."""

    def resume(self) -> bool:
        """Serves again; False when what was served is no longer there. May raise."""

    def close(self) -> None:
        """Drains, says goodbye; idempotent, never raises."""


def stay(member: Member, record: Record, engine: str = "") -> None:
    """Keeps a membership until its engine or this process ends, and sees to its goodbye however that comes.

    `engine` is what `EngineWatch` is told. Thread-safe.
    """
    try:
        will = LastWill(record)
    except OSError as error:
        _log.warning("nobody will say goodbye for worker %s if it is killed: %s", record.worker_id, error)
        will = None
    with _lock:
        if os.getpid() not in _owner:
            _members.clear()
            _owner[:] = [os.getpid()]
            util.Finalize(None, leave, args=("the process ends",), exitpriority=100)
        _members.append((member, will, engine))


def leave(reason: str, engine: str = "") -> int:
    """Leaves the memberships of an engine, or all of this process; how many. Idempotent, thread-safe, never raises."""
    leaving = _of(engine)
    with _lock:
        _members[:] = [entry for entry in _members if entry not in leaving]
    for member, will, _engine in leaving:
        _log.info("no longer serving: %s", reason)
        member.close()
        if will is not None:
            will.revoke()
    return len(leaving)


class EngineWatch:
    """Called around what an engine does to its weights (`compat.watch_worker`), on the engine's thread."""

    def sleeping(self, engine: str, level: int) -> None:
        """Before the engine sleeps: at level 1 it keeps its weights in host memory, above it drops them."""
        if level > 1:
            leave("the engine sleeps and drops its weights", engine)
            return
        for member, _will, _engine in _of(engine):
            drained = member.pause()
            _log.info("not serving while the engine sleeps%s", "" if drained else "; readers were cut off")

    def awake(self, engine: str, tags: Sequence[str] | None) -> None:
        """After the engine woke up; `tags` as vLLM has them: None, or what of its memory is back."""
        if tags is not None and "weights" not in tags:
            return
        for member, will, _engine in _of(engine):
            if _resumed(member):
                _log.info("the engine is awake and its weights are what they were: serving again")
                continue
            _log.warning("the engine is awake, but its weights are not what was served: no longer serving")
            _forget(member, will)

    def changing(self, engine: str, what: str) -> None:
        """Before weights are written to."""
        leave(f"the engine's weights are changed ({what})", engine)

    def ending(self, engine: str) -> None:
        """Before the engine gives its memory back."""
        leave("the engine ends", engine)


def _of(engine: str) -> list[tuple[Member, LastWill | None, str]]:
    """What an engine offers; of one that is not known, everything: rather too little is served than what is gone."""
    with _lock:
        present = list(_members) if os.getpid() in _owner else []
    return [entry for entry in present if entry[2] == engine != ""] or present


def _resumed(member: Member) -> bool:
    try:
        return member.resume()
    except MxError as error:
        _log.warning("serving again after sleep failed: %s", error)
        return False


def _forget(member: Member, will: LastWill | None) -> None:
    with _lock:
        _members[:] = [entry for entry in _members if entry[0] is not member]
    member.close()
    if will is not None:
        will.revoke()

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
_members: list[tuple[Member, LastWill | None]] = []
_owner: list[int] = []  # the process that registered the exit function: a fork must not say its parent's goodbye


class Member(Protocol):
    """What can be paused and left."""

    def pause(self) -> bool:
        """Serves nothing for a while; False when readers were cut off. Idempotent."""

    def resume(self) -> bool:
        """Serves again; False when what was served is no longer there. May raise."""

    def close(self) -> None:
        """Drains, says goodbye; idempotent, never raises."""


def stay(member: Member, record: Record) -> None:
    """Keeps a membership until this process ends, and sees to its goodbye however that comes. Thread-safe."""
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
        _members.append((member, will))


def leave(reason: str) -> int:
    """Leaves all memberships of this process; returns how many. Idempotent, thread-safe, never raises."""
    with _lock:
        members = list(_members) if os.getpid() in _owner else []
        _members.clear()
    for member, will in members:
        _log.info("no longer serving: %s", reason)
        member.close()
        if will is not None:
            will.revoke()
    return len(members)


class EngineWatch:
    """Called around what the engine does to its weights (`compat.watch_worker`), on the engine's thread."""

    def sleeping(self, level: int) -> None:
        """Before the engine sleeps: at level 1 it keeps its weights in host memory, above it drops them."""
        if level > 1:
            leave("the engine sleeps and drops its weights")
            return
        for member, _will in _present():
            drained = member.pause()
            _log.info("not serving while the engine sleeps%s", "" if drained else "; readers were cut off")

    def awake(self, tags: Sequence[str] | None) -> None:
        """After the engine woke up; `tags` as vLLM has them: None, or what of its memory is back."""
        if tags is not None and "weights" not in tags:
            return
        for member, will in _present():
            if _resumed(member):
                _log.info("the engine is awake and its weights are what they were: serving again")
                continue
            _log.warning("the engine is awake, but its weights are not what was served: no longer serving")
            _forget(member, will)

    def changing(self, what: str) -> None:
        """Before weights are written to."""
        leave(f"the engine's weights are changed ({what})")

    def ending(self) -> None:
        """Before the engine gives its memory back."""
        leave("the engine ends")


def _present() -> list[tuple[Member, LastWill | None]]:
    with _lock:
        return list(_members) if os.getpid() in _owner else []


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

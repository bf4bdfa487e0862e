"""The memberships of this process: kept while its engines live, left on the way out.

vLLM's engine core and workers are children of `multiprocessing`, which run no `atexit` functions;
`multiprocessing.util.Finalize` runs in them and at the end of an ordinary process. For those that are killed there is
`vllm_plugin.last_will`.
"""

from __future__ import annotations

import logging
import os
import threading
from multiprocessing import util
from typing import Protocol

from vllm_plugin.last_will import LastWill, Record

_log = logging.getLogger(__name__)
_lock = threading.Lock()
_members: list[tuple[Member, LastWill | None]] = []
_owner: list[int] = []  # the process that registered the exit function: a fork must not say its parent's goodbye


class Member(Protocol):
    """What can be left."""

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

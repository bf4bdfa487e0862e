"""Whether locks of files hold: some file systems have none, and some grant each one without holding it."""

from __future__ import annotations

import fcntl
import os
import uuid
from pathlib import Path

from mxserver.wire.unique_path import unique_beside

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_OWN_ID = uuid.uuid4().hex


def host_id() -> str:
    """32 hex digits for this boot of this machine, in all of its containers: where locks of files hold for certain.

    Whether they hold between hosts too, nobody can see from one of them. Where it cannot be read (no /proc), each
    process has its own (and those that it forks have it): it shares what is being made with no other.
    """
    try:
        return _BOOT_ID.read_text("ascii").strip().replace("-", "")
    except OSError:
        return _OWN_ID


def locks_work(folder: Path) -> bool:
    """Whether a lock of a file in this folder is seen by another opening of it. Raises OSError: nothing can be made."""
    probe = unique_beside(folder / "lock")
    first = os.open(probe, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        second = os.open(probe, os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
            fcntl.flock(second, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return False
        finally:
            os.close(second)
    finally:
        os.close(first)
        probe.unlink(missing_ok=True)
    return False

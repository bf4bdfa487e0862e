"""What tests have started ends when their pytest does, however it ends: killed by a time-out, it ends nothing itself.

All that a test starts, and what that starts, inherits a mark in its environment. A process of its own waits for the end
of pytest, and ends what still has the mark then.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
import uuid
from contextlib import suppress
from pathlib import Path

MARK = "TESTS_STARTED_BY"
_TIMES, _PAUSE_SECONDS = 100, 0.05  # what is just being started may be missed at first


def begin() -> None:
    """Marks what this process starts from here on, and has it ended with this process. Idempotent."""
    if os.environ.get(MARK, "").startswith(f"{os.getpid()}-"):
        return
    os.environ[MARK] = f"{os.getpid()}-{uuid.uuid4().hex}"
    nowhere = subprocess.DEVNULL
    command = [sys.executable, "-I", "-S", __file__, str(os.getpid()), os.environ[MARK]]
    subprocess.run(command, check=True, stdin=nowhere, stdout=nowhere)


def marked(mark: str) -> list[int]:
    """The processes that have the mark, this one aside."""
    wanted, found = f"{MARK}={mark}".encode(), []
    for entry in Path("/proc").iterdir():
        with suppress(OSError):  # it has ended, or is another user's
            if entry.name.isdigit() and wanted in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
    return [pid for pid in found if pid != os.getpid()]


def wait_and_end(pid: int, mark: str) -> None:
    """Returns at once; what it is for happens in a process that is nobody's child."""
    watched = os.pidfd_open(pid)
    if os.fork():
        return
    os.setsid()
    select.select([watched], [], [])
    for _ in range(_TIMES):
        pids = marked(mark)
        if not pids:
            return
        for each in pids:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(each, signal.SIGKILL)
        time.sleep(_PAUSE_SECONDS)


if __name__ == "__main__":
    wait_and_end(int(sys.argv[1]), sys.argv[2])

"""Says goodbye for a worker that was killed.

Engines end their workers with SIGKILL (`vllm serve` right after SIGTERM, as `--shutdown-timeout` is 0 by default), so
that nothing in them gets to run. A small process outside of their tree, started with this file as its program, watches
the worker and marks its record STALE when the worker is gone, whatever it died of; receivers then do not try a source
that is not there, and need not wait for its lease to end. After an orderly goodbye it just ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import time
from typing import NamedTuple

ATTEMPTS = 3
PAUSE_SECONDS = 1.0
TIMEOUT_SECONDS = 5.0


class Record(NamedTuple):
    """What names a worker at its server."""

    server_address: str
    source_id: str
    worker_id: str
    worker_rank: int


class Departure:
    """The watcher of this process' record. `revoke` after an orderly goodbye; idempotent, never raises."""

    def __init__(self, record: Record) -> None:
        """Raises OSError when no process can be started."""
        paths = [path for path in sys.path if path]
        self._watcher = subprocess.Popen(
            [sys.executable, "-P", __file__, str(os.getpid())],  # as a file: the package would import torch
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
        self._write(json.dumps(record._asdict()))
        self._watcher.wait()  # the program forks at once and goes on without a parent: out of the engine's tree

    def revoke(self) -> None:
        """The goodbye was said: the watcher ends."""
        if self._watcher.stdin is not None and not self._watcher.stdin.closed:
            self._write("said")
            with contextlib.suppress(OSError):
                self._watcher.stdin.close()

    def _write(self, line: str) -> None:
        if self._watcher.stdin is not None:
            with contextlib.suppress(OSError):
                self._watcher.stdin.write(line.encode() + b"\n")
                self._watcher.stdin.flush()


def is_gone(worker_pid: int, commands: int) -> bool:
    """Waits; False when `commands` (a file descriptor) says that the goodbye was said, True when the worker died."""
    poll = select.poll()
    poll.register(commands, select.POLLIN | select.POLLHUP)
    try:
        death: int | None = os.pidfd_open(worker_pid)
    except ProcessLookupError:
        return True
    except OSError:  # a kernel before 5.3: the pipe's end has to do
        death = None
    if death is not None:
        poll.register(death, select.POLLIN)
    while True:
        ready = [descriptor for descriptor, _ in poll.poll()]
        if commands in ready:
            said = os.read(commands, 64)
            return not said.startswith(b"said")
        if death in ready:
            return True


def say_goodbye(record: Record) -> bool:
    """Marks the record STALE; False when the server gave no answer, or no longer knows the record."""
    from mxserver.wire import ServerRefused, ServerUnreachable
    from mxserver.wire.calls import ServerClient
    from mxserver.wire.proto import p2p_pb2

    with ServerClient(record.server_address, timeout_seconds=TIMEOUT_SECONDS) as client:
        for attempt in range(ATTEMPTS):
            try:
                stale = p2p_pb2.SOURCE_STATUS_STALE
                client.update_status(record.source_id, record.worker_id, record.worker_rank, stale)
            except ServerRefused:
                return False
            except ServerUnreachable:
                if attempt + 1 < ATTEMPTS:
                    time.sleep(PAUSE_SECONDS)
            else:
                return True
    return False


def main() -> int:
    """The watcher's program; its argument is the worker's process id, its input a record and perhaps `said`."""
    if os.fork():
        return 0
    worker_pid = int(sys.argv[1])
    line = b""
    while not line.endswith(b"\n"):
        part = os.read(0, 1)
        if not part:
            return 1
        line += part
    record = Record(**json.loads(line))
    import mxserver.wire.calls  # noqa: F401 - now, not when every millisecond counts

    return 0 if not is_gone(worker_pid, 0) or say_goodbye(record) else 1


if __name__ == "__main__":
    sys.exit(main())

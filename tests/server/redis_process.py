"""A real redis-server for tests, on a socket in a folder of its own."""

from __future__ import annotations

import atexit
import shutil
import signal
import subprocess
import tempfile
import threading
from pathlib import Path

import redis

LASTING = ("--appendonly", "yes", "--appendfsync", "always")


class RedisProcess:
    """Starts redis-server and waits until it answers. It can be killed and started again over the same files."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        program = shutil.which("redis-server")
        assert program is not None, "redis-server is missing: install Debian's package redis-server"
        self.socket = folder / "redis.sock"
        self.url = f"unix://{self.socket}"
        self._command = [program, "--port", "0", "--unixsocket", str(self.socket), "--dir", str(folder)]
        self._command += ["--save", "", "--loglevel", "warning", *arguments]
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL)
        pause = threading.Event()
        with redis.Redis(unix_socket_path=str(self.socket)) as client:
            for _ in range(12_000):
                try:
                    client.ping()
                except redis.ConnectionError:  # also while it loads its file
                    pause.wait(0.01)
                else:
                    return
        raise AssertionError("redis-server does not answer")

    def client(self) -> redis.Redis:
        return redis.Redis(unix_socket_path=str(self.socket))

    def kill(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.terminate()
            self.process.wait()


_shared: list[RedisProcess] = []


def shared_redis() -> RedisProcess:
    """One for all tests of this process that neither stop it nor look at all of it; it keeps no file.

    Somebody who tidies up the folder of temporary files takes its socket away: then there is another one.
    """
    if _shared and _shared[-1].socket.exists():
        return _shared[-1]
    folder = Path(tempfile.mkdtemp(prefix="mx-redis-"))
    started = RedisProcess(folder, "--appendonly", "no")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    atexit.register(started.stop)
    _shared.append(started)
    return started

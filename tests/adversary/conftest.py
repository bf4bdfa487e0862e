"""A server with honest workers, in a store of choice: STORE=sqlite (default), memory, redis."""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.adversary.honest import Honest
from tests.adversary.machine import FaultyDisk, WallClock
from tests.server.conftest import ROOT, ServerProcess
from tests.server.redis_process import LASTING, RedisProcess

STORE = os.environ.get("STORE", "sqlite")
PUBLISH_TOKEN, HONEST_TOKEN = "p" * 40, "h" * 40
LEASE_SECONDS = 9.0  # a tenth of the default, as all time-outs here
ATTACK_SECONDS = float(os.environ.get("ATTACK_SECONDS", "10"))  # longer than a lease
AFTER_SECONDS = 3.0
STATUS_PAGE = re.compile(r"status page on http://\S*:(\d+)")
MODEL_MIB = 64


class Attacked:
    """A server process with honest workers, and what it stands on."""

    def __init__(self, folder: Path, environ: dict[str, str], arguments: tuple[str, ...] = ()) -> None:
        """`folder` has the server's state; what is there already stays."""
        self.folder = folder
        self._environ, self._arguments = environ, arguments
        self._hub = socket.create_server(("127.0.0.1", 0), backlog=1)  # takes connections, and never answers
        self.redis: RedisProcess | None = None
        if STORE == "redis":
            self.redis = RedisProcess(folder, *LASTING)
        self._write_access()
        self.start()

    def _write_access(self) -> None:
        entries = [("worker", "publish", PUBLISH_TOKEN), ("honest", "publish", HONEST_TOKEN)]
        lines = []
        for name, role, token in entries:
            digest = hashlib.sha256(token.encode()).hexdigest()
            lines += ["[[tokens]]", f'name = "{name}"', f'role = "{role}"', f'sha256 = "{digest}"']
        (self.folder / "access.toml").write_text("\n".join(lines))

    def start(self, known: dict[str, int] | None = None) -> None:
        """`known`: workers of an earlier server (id -> epoch), which do not publish again."""
        models = self.folder / "models"
        self.model = models / "big"
        if not models.exists():
            self.model.mkdir(parents=True)
            (self.model / "config.json").write_text("{}")
            (self.model / "model.bin").write_bytes(bytes(MODEL_MIB * 1024 * 1024))
        redis = ("--redis-url", self.redis.url) if self.redis else ()
        self.server = ServerProcess(
            *("--port", "0", "--store", STORE, "--store-path", str(self.folder / "state.sqlite3"), *redis),
            *("--auth", "file", "--auth-file", str(self.folder / "access.toml")),
            *("--cache-dir", str(self.folder / "cache"), "--file-sources", str(models)),
            *("--heartbeat-timeout", str(LEASE_SECONDS), "--cache-lease", "3", "--drain", "1"),
            *("--limits", "silence_seconds=3"),
            *self._arguments,
            environ={"HF_ENDPOINT": f"http://127.0.0.1:{self._hub.getsockname()[1]}", **self._environ},
        )
        self.http_port = int(self.server.wait_for(STATUS_PAGE)[1])
        self.honest = Honest(
            self.server.address, self.http_port, self.server.process.pid, LEASE_SECONDS, HONEST_TOKEN, known
        )

    @contextmanager
    def under(self, name: str, token: str = PUBLISH_TOKEN) -> Iterator[dict[str, int]]:
        """While the hostile client is at it. The dictionary has its outcomes afterwards."""
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "tests.adversary.hostile", name, self.server.address, str(self.http_port)),
                *(self.model.as_uri(), token),
            ],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        outcomes: dict[str, int] = {}
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "going\n"
            yield outcomes
        finally:
            out, _ = process.communicate(timeout=60)
            outcomes.update(json.loads(out.splitlines()[-1]) if out else {})

    def close(self) -> None:
        self.honest.close()
        self.server.close()
        if self.redis is not None:
            self.redis.stop()
        self._hub.close()


@pytest.fixture
def disk(tmp_path: Path) -> FaultyDisk:
    """What the servers of this test write to."""
    return FaultyDisk(tmp_path / "server", tmp_path)


@pytest.fixture
def wall_clock(tmp_path: Path) -> WallClock:
    """What the servers of this test take for the time."""
    return WallClock(tmp_path)


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Attacked]]:
    """Starts servers with honest workers, with these names in the environment."""
    for name in [name for name in os.environ if name.startswith(("MX_", "MODEL_EXPRESS_", "REDIS_"))]:
        monkeypatch.delenv(name)
    folder = tmp_path / "server"
    folder.mkdir()
    started: list[Attacked] = []

    def begin(environ: dict[str, str] | None = None, *arguments: str) -> Attacked:
        started.append(Attacked(folder, environ or {}, arguments))
        return started[-1]

    yield begin
    for one in started:
        one.close()


@pytest.fixture
def attacked(start: Callable[..., Attacked]) -> Attacked:
    return start()

"""Servers over real sockets: in this process, or as a process of their own."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

import mxserver.server
from mxserver.server import Server
from mxserver.settings import ServerSettings, load_settings
from mxserver.store import Clock, SourceStore, SqliteStore
from mxserver.wire.calls import ServerClient

ROOT = Path(__file__).resolve().parents[2]
LISTENING = re.compile(r"listening on \S*:(\d+)")


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting of whoever runs the tests counts."""
    for name in [name for name in os.environ if name.startswith(("MX_", "MODEL_EXPRESS_", "REDIS_"))]:
        monkeypatch.delenv(name)


@pytest.fixture
def opened_stores(monkeypatch: pytest.MonkeyPatch) -> list[SourceStore]:
    """The stores that servers of this test open, to look at what is beneath a server."""
    opened: list[SourceStore] = []
    open_store = mxserver.server.open_store

    def open_and_note(settings: ServerSettings, clock: Clock | None = None) -> SourceStore:
        opened.append(open_store(settings, clock))
        return opened[-1]

    monkeypatch.setattr(mxserver.server, "open_store", open_and_note)
    return opened


@pytest.fixture
def sqlite_store(opened_stores: list[SourceStore], server: Server) -> SqliteStore:
    """The store of `server`."""
    [store] = opened_stores
    assert isinstance(store, SqliteStore)
    return store


@pytest.fixture
def server(tmp_path: Path, opened_stores: list[SourceStore]) -> Iterator[Server]:
    path = str(tmp_path / "state.sqlite3")
    running = Server(load_settings({"host": "127.0.0.1", "port": "0", "store_path": path, "drain_seconds": "120"}))
    yield running
    running.close()


@pytest.fixture
def client(server: Server) -> Iterator[ServerClient]:
    with ServerClient(f"127.0.0.1:{server.port}") as opened:
        yield opened


class ServerProcess:
    """`python -m mxserver` with its log lines; the constructor waits until it listens.

    `launcher` is a command that becomes the one that follows it.
    """

    def __init__(self, *arguments: str, environ: dict[str, str] | None = None, launcher: Sequence[str] = ()) -> None:
        self.lines: list[str] = []
        self._more = threading.Condition()
        self._ended = False
        self.process = subprocess.Popen(
            [*launcher, sys.executable, "-m", "mxserver", "--host", "127.0.0.1", *arguments],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **(environ or {})},
            cwd=ROOT,
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        try:
            self.port = int(self.wait_for(LISTENING)[1])
        except AssertionError:
            self.close()
            raise
        self.address = f"127.0.0.1:{self.port}"

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self._more:
                self.lines.append(line.rstrip("\n"))
                self._more.notify_all()
        with self._more:
            self._ended = True
            self._more.notify_all()

    def wait_for(self, pattern: re.Pattern[str] | str, timeout_seconds: float = 120.0) -> re.Match[str]:
        """The first match in any log line so far or to come; fails at once when the process has ended without."""
        matches: list[re.Match[str]] = []

        def seen() -> bool:
            matches.extend(match for line in self.lines if (match := re.search(pattern, line)))
            return bool(matches) or self._ended

        with self._more:
            self._more.wait_for(seen, timeout_seconds)
            assert matches, f"no {pattern!r} in {self.lines}{' and the process has ended' * self._ended}"
        return matches[0]

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def wait(self) -> int:
        """The exit code; all log lines are there afterwards."""
        code = self.process.wait(120)
        self._reader.join()
        return code

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.wait()
        assert self.process.stderr is not None
        self.process.stderr.close()


@pytest.fixture
def start_server(tmp_path: Path) -> Iterator[Callable[..., ServerProcess]]:
    """Starts servers on a free port over one file, and ends them after the test."""
    started: list[ServerProcess] = []

    def start(*arguments: str, **environ: str) -> ServerProcess:
        defaults = ("--port", "0", "--store-path", str(tmp_path / "state.sqlite3"))
        started.append(ServerProcess(*defaults, *arguments, environ=environ))
        return started[-1]

    yield start
    for process in started:
        process.close()

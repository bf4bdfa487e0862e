"""A real server, and what processes of these tests are told of it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mxbench.demo.workers import Server

# Nobody stalls on a busy machine, and who leaves is not waited for long.
PATIENT = {"MX_STALL_TIMEOUT_SECS": 20, "MX_SERVER_TIMEOUT_SECS": 60, "MX_DRAIN_TIMEOUT_SECS": 5}


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    process = Server(tmp_path_factory.mktemp("server"))
    try:
        yield process.start()
    finally:
        process.child.stop()


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting of whoever runs the tests counts."""
    for name in [name for name in os.environ if name.startswith(("MX_", "MODEL_EXPRESS_"))]:
        monkeypatch.delenv(name)


@pytest.fixture
def at(server: str) -> dict[str, Any]:
    """The keywords that name server and settings."""
    return {"server": server, "settings": {"MX_WORKER_HOST": "127.0.0.1", "MX_TRANSPORT": "tcp", **PATIENT}}


@pytest.fixture
def name(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A name that nobody else publishes under."""
    return f"{request.node.name}/{tmp_path.name}"

"""Servers in this process with certificates and tokens, and what calls them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mxbench.stand_ins.authority import Authority
from mxserver.server import Server
from mxserver.settings import load_settings
from mxserver.wire.calls import source_id
from mxserver.wire.proto import p2p_pb2

IDENTITY = p2p_pb2.SourceIdentity(mx_version="mx-1", model_name="m")
SOURCE = source_id(IDENTITY)
WORKER = p2p_pb2.WorkerMetadata(nixl_metadata=b"agent")
READY = p2p_pb2.SOURCE_STATUS_READY

StartServer = Callable[..., Server]


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting of whoever runs the tests counts."""
    for name in [name for name in os.environ if name.startswith(("MX_", "MODEL_EXPRESS_", "REDIS_"))]:
        monkeypatch.delenv(name)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


@pytest.fixture
def start_server() -> Iterator[StartServer]:
    """Starts servers with a memory store on free ports; settings by field name."""
    started: list[Server] = []

    def start(**settings: object) -> Server:
        flags = {"host": "127.0.0.1", "port": "0", "store": "memory", "drain_seconds": "1", **settings}
        started.append(Server(load_settings({name: str(value) for name, value in flags.items()})))
        return started[-1]

    yield start
    for server in started:
        server.close()


def access_file(path: Path, *entries: tuple[str, str, str], kind: str = "tokens") -> Path:
    """Writes an access file of (name, role, token), or of (name, role, "") for subjects."""
    lines = []
    for name, role, token in entries:
        lines += [f"[[{kind}]]", f'name = "{name}"', f'role = "{role}"']
        if kind == "tokens":
            lines.append(f'sha256 = "{hashlib.sha256(token.encode()).hexdigest()}"')
    fresh = path.with_suffix(".fresh")
    fresh.write_text("\n".join(lines) + "\n")
    fresh.replace(path)
    return path

"""Server processes with their HTTP port, and a fleet of workers made by real calls."""

from __future__ import annotations

import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from email.message import Message
from pathlib import Path
from typing import Any

import pytest

from mxserver.wire.calls import ServerClient
from mxserver.wire.proto import load_pb2, p2p_pb2
from tests.server.conftest import ServerProcess
from tests.web.browser import Browser

READY = p2p_pb2.SOURCE_STATUS_READY
INITIALIZING = p2p_pb2.SOURCE_STATUS_INITIALIZING


@dataclass
class HttpAnswer:
    status: int
    headers: Message  # names in any case of letters
    body: bytes = field(repr=False)

    @property
    def text(self) -> str:
        return self.body.decode()


def ask(url: str, method: str = "GET", **headers: str) -> HttpAnswer:
    """One request; every status is an answer."""
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    request = urllib.request.Request(url, headers=names, method=method)  # noqa: S310 - this machine
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:  # noqa: S310 - this machine
            return HttpAnswer(answer.status, answer.headers, answer.read())
    except urllib.error.HTTPError as error:
        with error:
            return HttpAnswer(error.code, error.headers, error.read())


def wait_for(met: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not met():
        assert time.monotonic() < deadline
        time.sleep(0.05)


class WebServer(ServerProcess):
    """A server process that knows its HTTP address."""

    def __init__(self, *arguments: str, environ: dict[str, str] | None = None) -> None:
        super().__init__(*arguments, environ=environ)
        self.url = self.wait_for(re.compile(r"status page on (http://[\d.]+:\d+)"))[1]

    def status(self, query: str = "") -> dict[str, Any]:
        data: dict[str, Any] = json.loads(ask(f"{self.url}/status{query}").body)
        return data

    def metric(self, series: str) -> float | None:
        """The value of one series, as a scrape sees it."""
        for line in ask(f"{self.url}/metrics").text.splitlines():
            if line.startswith(series + " "):
                return float(line.rsplit(" ", 1)[1])
        return None


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting of whoever runs the tests counts."""
    for name in [name for name in os.environ if name.startswith(("MX_", "MODEL_EXPRESS_", "OTEL_"))]:
        monkeypatch.delenv(name)


@pytest.fixture
def start_web(tmp_path: Path) -> Iterator[Callable[..., WebServer]]:
    started: list[WebServer] = []

    def start(*arguments: str, **environ: str) -> WebServer:
        defaults = ("--port", "0", "--store-path", str(tmp_path / "state.sqlite3"))
        started.append(WebServer(*defaults, *arguments, environ=environ))
        return started[-1]

    yield start
    for server in started:
        server.close()


@pytest.fixture
def web(start_web: Callable[..., WebServer]) -> WebServer:
    return start_web()


@pytest.fixture(scope="session")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    opened = Browser(tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


@pytest.fixture
def browser(chromium: Browser) -> Iterator[Browser]:
    """The one browser, away from any page before and after the test, so that no page outlives its server."""
    yield chromium
    chromium.open("about:blank")
    chromium.console()
    chromium.size(1280, 900)


@pytest.fixture
def client(web: WebServer) -> Iterator[ServerClient]:
    with ServerClient(web.address) as opened:
        yield opened


def identity(model: str = "Qwen/Qwen3-8B", **fields: Any) -> p2p_pb2.SourceIdentity:
    values: dict[str, Any] = {
        "mx_version": "mx-1",
        "model_name": model,
        "backend_framework": p2p_pb2.BACKEND_FRAMEWORK_VLLM,
        "tensor_parallel_size": 1,
        "dtype": "bfloat16",
        "extra_parameters": {"layout": "processed"},
    }
    return p2p_pb2.SourceIdentity(**values | fields)


def publish(
    client: ServerClient,
    worker_id: str,
    status: p2p_pb2.SourceStatus.ValueType = READY,
    *,
    of: p2p_pb2.SourceIdentity | None = None,
    rank: int = 0,
    report: load_pb2.LoadReport | None = None,
) -> p2p_pb2.PublishMetadataResponse:
    worker = p2p_pb2.WorkerMetadata(
        worker_rank=rank,
        nixl_metadata=b"agent",
        accelerator="NVIDIA H200",
        worker_grpc_endpoint=f"10.42.{len(worker_id)}.{rank + 7}:6555",
        status=status,
    )
    return client.publish(of or identity(), worker, worker_id, load_report=report)

"""The HTTP port of a real server process: probes, headers, limits, slow and hostile clients."""

from __future__ import annotations

import contextlib
import gzip
import json
import re
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mxserver.web import http
from mxserver.web.http import Answer, HttpServer, Request
from mxserver.wire.client import ServerClient
from tests.web.conftest import INITIALIZING, WebServer, ask, identity, publish


@pytest.mark.parametrize("path", ["/livez", "/readyz"])
def test_probe_says_ok(web: WebServer, path: str) -> None:
    answer = ask(web.url + path)
    assert (answer.status, answer.body) == (200, b"ok\n")
    assert answer.headers["Cache-Control"] == "no-store"


@pytest.mark.parametrize(
    "path", ["/", "/page.js", "/page.css", "/icon.svg", "/status", "/metrics", "/livez", "/nowhere"]
)
def test_every_answer_carries_the_policy(web: WebServer, path: str) -> None:
    headers = ask(web.url + path).headers
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Server"] == "mxserver"


def test_page_has_nothing_inline_and_nothing_from_elsewhere(web: WebServer) -> None:
    text = ask(web.url + "/").text
    assert not re.search(r"<script(?![^>]*src=)|<style|style=|\son\w+=|https?://", text)


def test_asset_is_not_sent_again(web: WebServer) -> None:
    first = ask(web.url + "/page.js")
    again = ask(web.url + "/page.js", If_None_Match=first.headers["ETag"])
    assert (again.status, again.body) == (304, b"")


def test_compressed_for_who_asks(web: WebServer) -> None:
    plain = ask(web.url + "/page.css")
    packed = ask(web.url + "/page.css", Accept_Encoding="gzip")
    assert gzip.decompress(packed.body) == plain.body
    assert len(packed.body) < len(plain.body)


def test_head_has_no_body(web: WebServer) -> None:
    answer = ask(web.url + "/status", "HEAD")
    assert (answer.status, answer.body) == (200, b"")
    assert int(answer.headers["Content-Length"]) > 100


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "PROPFIND"])
def test_other_methods_are_refused(web: WebServer, method: str) -> None:
    answer = ask(web.url + "/livez", method)
    assert answer.status == 405
    assert answer.headers["Allow"] == "GET, HEAD"


def test_unknown_path_names_the_known_ones(web: WebServer) -> None:
    answer = ask(web.url + "/healthz")
    assert answer.status == 404
    assert "/readyz" in answer.text


@pytest.mark.parametrize("query", ["?workers=-1", "?workers=x", "?workers=%D9%A3", "?workers=1e9"])
def test_bad_query_is_refused(web: WebServer, query: str) -> None:
    assert ask(f"{web.url}/status{query}").status == 400


def test_traversal_is_no_path(web: WebServer) -> None:
    assert ask(web.url + "/../../etc/passwd").status == 404


@pytest.mark.parametrize(
    "sent",
    [
        b"\r\n\r\n",
        b"GARBAGE\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"\xff\xfe\x00\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"a" * 70000,
    ],
)
def test_garbage_costs_one_connection(web: WebServer, sent: bytes) -> None:
    with socket.create_connection(("127.0.0.1", int(web.url.rsplit(":", 1)[1])), timeout=30) as client:
        client.sendall(sent)
        client.shutdown(socket.SHUT_WR)
        try:
            while client.recv(65536):
                pass
        except ConnectionResetError:
            pass  # closed with bytes unread: as good an end
    assert ask(web.url + "/livez").status == 200


def test_status_tells_fleets_by_state(web: WebServer, client: ServerClient) -> None:
    for n in range(4):
        publish(client, f"w{n}")
    publish(client, "late", INITIALIZING)
    other = publish(client, "x", of=identity("other/model")).mx_source_id
    status = web.status("?workers=2")
    assert status["totals"] == {
        "models": 2,
        "workers": 6,
        "initializing": 1,
        "ready": 5,
        "stale": 0,
        "loads_running": 0,
    }
    second, first = status["fleets"]
    assert (first["model_name"], first["workers_total"], first["ready"], first["initializing"]) == (
        "Qwen/Qwen3-8B",
        5,
        4,
        1,
    )
    assert [worker["worker_id"] for worker in first["workers"]] == ["late", "w0"]
    assert first["workers"][1]["accelerator"] == "NVIDIA H200"
    assert second["source_id"] == other
    assert status["server"]["ready"] is True
    assert status["server"]["store"] == "sqlite"


def test_status_keeps_what_is_secret(web: WebServer, client: ServerClient) -> None:
    """Agent metadata is what another process needs to reach a worker's memory."""
    publish(client, "w0")
    assert "agent" not in json.dumps(web.status())


def test_store_that_fails_turns_readiness_red(web: WebServer, client: ServerClient, tmp_path: Path) -> None:
    publish(client, "w0")
    state = tmp_path / "state.sqlite3"
    state.rename(tmp_path / "away")
    answer = ask(web.url + "/readyz")
    assert answer.status == 503
    assert "state.sqlite3" in answer.text
    assert ask(web.url + "/livez").status == 200, "a restart would not bring the file back"
    assert web.status()["server"]["ready"] is False
    assert web.metric("mxserver_ready") == 0
    (tmp_path / "away").rename(state)
    assert ask(web.url + "/readyz").status == 200
    assert [error["kind"] for error in web.status()["errors"]] == ["store"]


def test_sigterm_is_seen_by_probes_before_calls_are_refused(start_web: Callable[..., WebServer]) -> None:
    """Calls are answered while /readyz is red, then drained; the exit code is 0."""
    web = start_web("--not-ready", "3")
    with ServerClient(web.address) as client:
        publish(client, "w0")
        web.signal(signal.SIGTERM)
        web.wait_for("not ready signal=SIGTERM seconds=3")
        red = ask(web.url + "/readyz")
        assert (red.status, red.body) == (503, b"draining\n")
        assert ask(web.url + "/livez").status == 200
        publish(client, "w1")
    assert web.wait() == 0
    assert web.lines[-1].endswith("stopped")


def test_second_signal_while_not_ready_ends_it(start_web: Callable[..., WebServer]) -> None:
    web = start_web("--not-ready", "600")
    web.signal(signal.SIGTERM)
    web.wait_for("not ready signal=SIGTERM")
    web.signal(signal.SIGTERM)
    assert web.wait() in (0, 128 + signal.SIGTERM)


def test_port_in_use_is_one_line(start_web: Callable[..., WebServer], web: WebServer, tmp_path: Path) -> None:
    port = web.url.rsplit(":", 1)[1]
    with pytest.raises(AssertionError, match=rf"cannot listen on 127.0.0.1:{port} for probes.*--metrics-port"):
        start_web("--metrics-port", port, "--store-path", str(tmp_path / "other.sqlite3"))


class Held:
    """A page that answers when told to."""

    def __init__(self) -> None:
        self.entered = threading.Semaphore(0)
        self.go_on = threading.Event()

    def __call__(self, _: Request) -> Answer:
        self.entered.release()
        assert self.go_on.wait(30)
        return Answer(b"done\n")


def test_too_many_connections_are_turned_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "MAX_CONNECTIONS", 2)
    held = Held()
    server = HttpServer("127.0.0.1", 0, {"/held": held})
    server.start()
    url = f"http://127.0.0.1:{server.port}/held"
    answers: list[int] = []
    threads = [threading.Thread(target=lambda: answers.append(ask(url).status)) for _ in range(2)]
    for thread in threads:
        thread.start()
        assert held.entered.acquire(timeout=30)
    assert ask(url).status == 503
    held.go_on.set()
    for thread in threads:
        thread.join()
    assert answers == [200, 200]
    server.stop()
    server.stop()


def test_slow_sender_is_cut_at_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "HEAD_SECONDS", 0.3)
    server = HttpServer("127.0.0.1", 0, {})
    server.start()
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as client:
        ended = threading.Event()

        def drip() -> None:
            while not ended.wait(0.05):
                try:
                    client.sendall(b"G")
                except OSError:
                    return

        dripping = threading.Thread(target=drip)
        started = time.monotonic()
        dripping.start()
        with contextlib.suppress(ConnectionResetError):
            assert client.recv(1) == b""
        ended.set()
        dripping.join()
        assert time.monotonic() - started < 30, "one byte at a time would take hours"
    server.stop()


def test_page_that_fails_is_answered_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    def fails(_: Request) -> Answer:
        raise RuntimeError("no reason for strangers")

    server = HttpServer("127.0.0.1", 0, {"/": fails})
    server.start()
    answer = ask(f"http://127.0.0.1:{server.port}/")
    server.stop()
    assert answer.status == 500
    assert "no reason" not in answer.text
    assert "no reason for strangers" in caplog.text


def test_listens_on_ipv6_and_ipv4_together() -> None:
    server = HttpServer("::", 0, {"/": lambda _: Answer(b"ok\n")})
    server.start()
    try:
        assert ask(f"http://127.0.0.1:{server.port}/").status == 200
        assert ask(f"http://[::1]:{server.port}/").status == 200
    finally:
        server.stop()

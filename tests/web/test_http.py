"""The HTTP port of a real server process: probes, headers, limits, slow and hostile clients."""

from __future__ import annotations

import contextlib
import gzip
import json
import logging
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.client import IncompleteRead
from pathlib import Path

import pytest
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from mxserver.web import HttpServer, http
from mxserver.web.pages import with_headers
from mxserver.web.status import SHOWN_DETAILS
from mxserver.wire.calls import ServerClient
from tests.web.conftest import INITIALIZING, WebServer, ask, identity, publish


@pytest.mark.parametrize("path", ["/livez", "/readyz"])
def test_probe_says_ok(web: WebServer, path: str) -> None:
    answer = ask(web.url + path)
    assert (answer.status, answer.body) == (200, b"ok\n")
    assert answer.headers["Cache-Control"] == "no-store"


@pytest.mark.parametrize(
    "path",
    ["/", "/page.js", "/drawings.js", "/page.css", "/icon.svg", "/errors", "/status", "/metrics", "/livez", "/nowhere"],
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
    assert set(answer.headers["Allow"].split(", ")) == {"GET", "HEAD"}


def test_unknown_path_names_the_known_ones(web: WebServer) -> None:
    answer = ask(web.url + "/healthz")
    assert answer.status == 404
    assert "/readyz" in answer.text


@pytest.mark.parametrize("query", ["?replicas=-1", "?bars=x", "?loads=%D9%A3", "?replicas=1e9"])
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
    with socket.create_connection(("127.0.0.1", int(web.url.rsplit(":", 1)[1])), timeout=120) as client:
        client.sendall(sent)
        client.shutdown(socket.SHUT_WR)
        try:
            while client.recv(65536):
                pass
        except ConnectionResetError:
            pass  # closed with bytes unread: as good an end
    assert ask(web.url + "/livez").status == 200


def test_status_has_sums_and_details_for_who_asks(web: WebServer, client: ServerClient) -> None:
    for n in range(4):
        publish(client, f"w{n}")
    publish(client, "late", INITIALIZING)
    other = publish(client, "x", of=identity("other/model")).mx_source_id
    status = web.status()
    totals = status["totals"]
    assert [totals[name] for name in ("models", "workers", "initializing", "ready", "stale")] == [2, 6, 1, 5, 0]
    assert (totals["replicas_ready"], totals["replicas_wanted"], totals["loads_running"]) == (5, 6, 0)
    assert status["details"] == {}
    [second], [first] = (
        [one for one in status["models"] if one["model_name"] == name] for name in ("other/model", "Qwen/Qwen3-8B")
    )
    assert first["replicas"] == {"initializing": 1, "incomplete": 0, "ready": 4, "stale": 0, "wanted": 5}
    assert second["replicas"]["ready"] == 1
    details = web.status("?model=QWEN/qwen3-8b&replicas=2&ranks=w0")["details"]["qwen/qwen3-8b"]
    assert [one["replica"] for one in details["replicas"]] == ["late", "w0"]
    assert (details["replicas_total"], details["left_out"]["replicas"]) == (5, 3)
    [rank] = details["replicas"][1]["ranks"]
    assert (rank["worker_id"], rank["accelerator"]) == ("w0", "NVIDIA H200")
    assert [one["source_id"] for one in web.status(f"?of={other}")["details"]["other/model"]["sources"]] == [other]
    assert status["server"]["ready"] is True
    assert status["server"]["store"] == "sqlite"


def test_details_are_given_of_those_that_one_asks_for(web: WebServer, client: ServerClient) -> None:
    """The finding M10: of a thousand fleets, the workers of all were megabytes each second for each open page."""
    for n in range(SHOWN_DETAILS + 2):
        publish(client, f"w{n}", of=identity(f"m/{n}"))
    assert web.status()["details"] == {}
    assert list(web.status("?model=m/1&model=nobody")["details"]) == ["m/1"]
    asked = "&".join(f"model=m/{n}" for n in range(SHOWN_DETAILS + 2))
    status = web.status(f"?{asked}")
    assert len(status["details"]) == SHOWN_DETAILS
    assert status["left_out"]["details"] == [f"m/{n}" for n in range(SHOWN_DETAILS, SHOWN_DETAILS + 2)]
    found = web.status("?search=W3")
    assert [one["model_name"] for one in found["models"]] == ["m/3"]
    assert (found["models_total"], found["totals"]["models"]) == (1, SHOWN_DETAILS + 2)


def test_status_keeps_what_is_secret(web: WebServer, client: ServerClient) -> None:
    """Agent metadata is what another process needs to reach a worker's memory."""
    publish(client, "w0")
    assert "agent" not in json.dumps(web.status("?model=Qwen/Qwen3-8B&ranks=*"))


def test_store_that_fails_turns_readiness_red(web: WebServer, client: ServerClient, tmp_path: Path) -> None:
    publish(client, "w0")
    state = tmp_path / "state.sqlite3"
    state.rename(tmp_path / "away")
    while (answer := ask(web.url + "/readyz")).status == 200:  # looked at once a second
        time.sleep(0.05)
    assert answer.status == 503
    assert "state.sqlite3" in answer.text
    assert ask(web.url + "/livez").status == 200, "a restart would not bring the file back"
    assert web.status()["server"]["ready"] is False
    assert web.metric("mxserver_ready") == 0
    (tmp_path / "away").rename(state)
    while ask(web.url + "/readyz").status != 200:
        time.sleep(0.05)
    assert {error["kind"] for error in web.status()["errors"]} == {"store"}


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


@contextlib.contextmanager
def serving(**endpoints: Callable[[Request], Response]) -> Iterator[HttpServer]:
    """A server in this process, with an endpoint by path."""
    server = HttpServer("127.0.0.1", 0, with_headers([Route(f"/{name}", page) for name, page in endpoints.items()]))
    server.start()
    yield server
    server.stop()
    server.stop()


def test_connections_of_others_never_turn_a_probe_red(web: WebServer) -> None:
    """More connections than the server keeps, all of them silent: each one makes room for the next, and for probes."""
    host, port = web.url.removeprefix("http://").split(":")
    with contextlib.ExitStack() as held:
        for _ in range(2 * http.MAX_CONNECTIONS // 8):
            for _ in range(8):
                held.enter_context(contextlib.closing(socket.create_connection((host, int(port)))))
            assert ask(web.url + "/livez").status == 200
        assert ask(web.url + "/readyz").status == 200


def test_what_is_being_answered_is_cut_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "MAX_CONNECTIONS", 3)
    entered, go_on = threading.Semaphore(0), threading.Event()

    def held(_: Request) -> Response:
        entered.release()
        assert go_on.wait(60)
        return PlainTextResponse("done\n")

    answers: list[int] = []
    with serving(held=held) as server, contextlib.ExitStack() as silent:
        url = f"http://127.0.0.1:{server.port}/held"
        threads = [threading.Thread(target=lambda: answers.append(ask(url).status)) for _ in range(2)]
        for thread in threads:
            thread.start()
            assert entered.acquire(timeout=60)
        first, *_ = [
            silent.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=60)) for _ in range(4)
        ]
        with contextlib.suppress(ConnectionResetError):
            assert first.recv(1) == b"", "the silent one that came first is closed"
        go_on.set()
        for thread in threads:
            thread.join()
    assert answers == [200, 200]


@pytest.mark.parametrize("first", [b"", b"GET /quick HTTP/1.1\r\nHost: x\r\n\r\n"])
def test_slow_sender_is_cut_at_the_deadline(monkeypatch: pytest.MonkeyPatch, first: bytes) -> None:
    """On a new connection, and on one that had an answer already."""
    monkeypatch.setattr(http, "HEAD_SECONDS", 0.3)
    with (
        serving(quick=lambda _: PlainTextResponse("ok\n")) as server,
        socket.create_connection(("127.0.0.1", server.port), timeout=60) as client,
    ):
        ended = threading.Event()
        client.sendall(first)

        def drip() -> None:
            while not ended.wait(0.02):
                try:
                    client.sendall(b"G")
                except OSError:
                    return

        if first:
            assert client.recv(65536).startswith(b"HTTP/1.1 200")
        dripping = threading.Thread(target=drip)
        dripping.start()
        with contextlib.suppress(ConnectionResetError):
            while client.recv(65536):
                pass  # one byte at a time would take hours
        ended.set()
        dripping.join()


def test_reader_that_does_not_read_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "HEAD_SECONDS", 0.1)
    monkeypatch.setattr(http, "ANSWER_SECONDS", 0.2)
    cut = threading.Event()
    lost = http._Protocol.connection_lost

    def connection_lost(protocol: http._Protocol, error: Exception | None) -> None:
        lost(protocol, error)
        cut.set()

    monkeypatch.setattr(http._Protocol, "connection_lost", connection_lost)
    with (
        serving(much=lambda _: Response(bytes(200 << 20))) as server,
        socket.create_connection(("127.0.0.1", server.port), timeout=60) as client,
    ):
        client.sendall(b"GET /much HTTP/1.1\r\nHost: x\r\n\r\n")
        assert cut.wait(60)


def test_answer_that_takes_longer_than_a_head_may_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "HEAD_SECONDS", 0.05)
    late = threading.Event()
    cut_or_not = http._Protocol._late

    def noted(protocol: http._Protocol) -> None:
        cut_or_not(protocol)
        late.set()

    def slow(_: Request) -> Response:
        assert late.wait(60)
        return PlainTextResponse("at last\n")

    monkeypatch.setattr(http._Protocol, "_late", noted)
    with serving(slow=slow) as server:
        assert ask(f"http://127.0.0.1:{server.port}/slow").text == "at last\n"


def test_page_that_fails_is_answered_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    def fails(_: Request) -> Response:
        raise RuntimeError("no reason for strangers")

    with serving(fails=fails) as server:
        answer = ask(f"http://127.0.0.1:{server.port}/fails")
    assert answer.status == 500
    assert "no reason" not in answer.text
    assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
    (record,) = (record for record in caplog.records if record.levelno >= logging.ERROR)
    assert record.name == "mxserver.web.pages"
    assert record.getMessage() == "page failed path=/fails"
    assert caplog.text.count("RuntimeError: no reason for strangers") == 1


def test_page_that_fails_in_the_middle_is_cut_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    """An answer that has begun cannot become a 500: the client must see that it is not whole."""

    def breaks(_: Request) -> Response:
        def parts() -> Iterator[str]:
            yield "the first part"
            raise RuntimeError("no second part")

        return StreamingResponse(parts(), media_type="text/plain")

    with serving(breaks=breaks) as server, pytest.raises(IncompleteRead):
        ask(f"http://127.0.0.1:{server.port}/breaks")
    records = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert [record.name for record in records] == ["uvicorn.error"]
    assert caplog.text.count("RuntimeError: no second part") == 1


def test_stop_before_start_lets_go_of_the_port() -> None:
    server = HttpServer("127.0.0.1", 0, with_headers([]))
    server.stop()
    with socket.create_server(("127.0.0.1", server.port)):
        pass


def test_listens_on_ipv6_and_ipv4_together() -> None:
    server = HttpServer("::", 0, with_headers([Route("/ok", lambda _: PlainTextResponse("ok\n"))]))
    server.start()
    try:
        assert ask(f"http://127.0.0.1:{server.port}/ok").status == 200
        assert ask(f"http://[::1]:{server.port}/ok").status == 200
    finally:
        server.stop()

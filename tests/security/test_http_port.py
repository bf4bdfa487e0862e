"""The HTTP port with certificates and tokens: what is open, who may see the rest, what rotates."""

from __future__ import annotations

import base64
import json
import logging
import socket
import ssl
import urllib.error
import urllib.request
from collections.abc import Callable
from email.message import Message
from pathlib import Path
from typing import NamedTuple

import pytest
from starlette.testclient import TestClient

from mxbench.stand_ins.authority import Authority
from mxserver.security import AccessUnknown, Role
from mxserver.security.roles import Caller
from mxserver.security.setup import warning
from mxserver.server import Server
from mxserver.settings import load_settings
from mxserver.web import application
from mxserver.web.models_view import StatusQuery
from mxserver.web.pages import is_own_name
from mxserver.wire import SettingError
from mxserver.wire.credentials import ClientCredentials, ServerTls, server_context
from tests.security.conftest import StartServer, access_file
from tests.web.browser import Browser

TOKEN = "t" * 40
OPEN = ("/livez", "/readyz", "/metrics", "/page.js", "/page.css", "/icon.svg")
GUARDED = ("/", "/status", "/metrics/models")


class Said(NamedTuple):
    status: int
    headers: Message
    body: bytes


def ask(port: int, path: str, context: ssl.SSLContext | None = None, authorization: str | None = None) -> Said:
    headers = {} if authorization is None else {"Authorization": authorization}
    url = f"{'http' if context is None else 'https'}://127.0.0.1:{port}{path}"
    try:
        request = urllib.request.Request(url, headers=headers)  # noqa: S310 - this machine
        with urllib.request.urlopen(request, timeout=60, context=context) as answer:  # noqa: S310
            return Said(answer.status, answer.headers, answer.read())
    except urllib.error.HTTPError as error:
        with error:
            return Said(error.code, error.headers, error.read())


def basic(password: str, user: str = "any") -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


@pytest.fixture
def guarded(start_server: StartServer, tmp_path: Path) -> Server:
    rules = access_file(tmp_path / "access.toml", ("reader", "read", TOKEN))
    return start_server(auth="file", auth_file=rules)


@pytest.mark.parametrize("path", OPEN)
def test_probes_metrics_and_files_need_no_token(guarded: Server, path: str) -> None:
    answer = ask(guarded.metrics_port, path)
    assert answer.status == 200
    assert b"worker_id" not in answer.body.replace(b"load.worker_id", b"") or path == "/page.js"


@pytest.mark.parametrize("path", GUARDED)
@pytest.mark.parametrize(
    ("authorization", "status"),
    [
        (None, 401),
        ("Bearer " + "x" * 40, 401),
        ("Bearer", 401),
        ("Digest " + TOKEN, 401),
        ("Basic !!", 401),
        (basic(""), 401),
        ("Bearer " + TOKEN, 200),
        ("bearer  " + TOKEN, 200),
        (basic(TOKEN), 200),
        (basic(TOKEN, user=""), 200),
    ],
)
def test_what_names_models_is_for_who_has_a_token(
    guarded: Server, path: str, authorization: str | None, status: int
) -> None:
    answer = ask(guarded.metrics_port, path, authorization=authorization)
    assert answer.status == status
    assert ("WWW-Authenticate" in answer.headers) == (status == 401)
    assert answer.headers["Cache-Control"] in ("no-store", "no-cache")
    if status == 401:
        assert TOKEN.encode() not in answer.body
        assert b"models" not in answer.body


def test_without_auth_all_may_see_all(start_server: StartServer) -> None:
    port = start_server().metrics_port
    assert [ask(port, path).status for path in (*OPEN, *GUARDED)] == [200] * 9


class Judge:
    """Says what it is told to."""

    def __init__(self, verdict: Callable[[], Caller]) -> None:
        self.verdict = verdict

    def authenticate(self, token: bytes) -> Caller:
        return self.verdict()


@pytest.mark.parametrize(
    ("host", "is_right"),
    [
        ("127.0.0.1", True),
        ("10.1.2.3:9401", True),
        ("[::1]:9401", True),
        ("localhost:9401", True),
        ("mxserver", True),
        ("mxserver.models.svc:9401", True),
        ("mxserver.models.svc.cluster.local", True),
        ("status.example.org", True),
        ("evil.example.net", False),
        ("svc.evil.net:9401", False),
        ("127.0.0.1.evil.net", False),
        ("localhost.evil.net:9401", False),
    ],
)
def test_page_is_shown_under_names_that_are_its_own(host: str, is_right: bool) -> None:
    """DNS rebinding: a site that somebody visits lets its name lead here, and reads the page by their browser."""
    assert is_own_name(host, ("status.example.org",)) is is_right


def test_name_of_another_site_sees_nothing(start_server: StartServer) -> None:
    port = start_server(metrics_hosts="status.example.org").metrics_port
    for path, status in (("/", 421), ("/status", 421), ("/readyz", 200), ("/metrics", 200)):
        request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", headers={"Host": "evil.example.net"})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310
                found = answer.status
        except urllib.error.HTTPError as error:
            with error:
                found = error.code
        assert found == status, path


def test_judge_that_does_not_answer_lets_nobody_in() -> None:
    def away() -> Caller:
        raise AccessUnknown("the API server does not answer")

    app = application(None, None, lambda: None, Judge(away), model_registry=None)  # type: ignore[arg-type] # never looked at
    with TestClient(app) as client:
        answer = client.get("/status", headers={"Authorization": f"Bearer {TOKEN}"})
        assert (answer.status_code, "does not answer" in answer.text) == (503, True)
        assert client.get("/livez").status_code == 200
        assert client.get("/status").status_code == 401


def test_every_role_may_look() -> None:
    class View:
        def as_json(self, query: StatusQuery) -> dict[str, int]:
            return {"replicas": query.replicas}

    for role in Role:
        judge = Judge(lambda role=role: Caller("c", role))  # type: ignore[misc]
        app = application(None, View(), lambda: None, judge, model_registry=None)  # type: ignore[arg-type]
        with TestClient(app) as client:
            assert client.get("/status", headers={"Authorization": f"Bearer {TOKEN}"}).json() == {"replicas": 20}


# TLS


def tls(start_server: StartServer, authority: Authority, **more: object) -> Server:
    cert, key = authority.issue("server", "127.0.0.1")
    return start_server(tls_cert_file=cert, tls_key_file=key, **more)


def test_port_takes_tls_with_the_servers_certificate_and_nothing_else(
    start_server: StartServer, authority: Authority
) -> None:
    port = tls(start_server, authority).metrics_port
    trusting = ssl.create_default_context(cafile=str(authority.ca_file))
    assert ask(port, "/readyz", trusting).body == b"ok\n"
    with pytest.raises(urllib.error.URLError, match="CERTIFICATE_VERIFY_FAILED"):
        ask(port, "/readyz", ssl.create_default_context())
    with pytest.raises(OSError, match=r"(?i)remote|reset|closed|empty"):
        ask(port, "/readyz")


def test_clients_certificates_are_not_asked_for_there(start_server: StartServer, authority: Authority) -> None:
    """Probes have none; tokens guard the page."""
    port = tls(start_server, authority, tls_client_ca_file=authority.ca_file).metrics_port
    assert ask(port, "/livez", ssl.create_default_context(cafile=str(authority.ca_file))).status == 200


def test_old_protocols_are_refused(start_server: StartServer, authority: Authority) -> None:
    port = tls(start_server, authority).metrics_port
    old = ssl.create_default_context(cafile=str(authority.ca_file))
    with pytest.warns(DeprecationWarning, match="TLSv1"):
        old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_1
    with pytest.raises(urllib.error.URLError):
        ask(port, "/livez", old)


def test_metrics_tls_off_leaves_it_plain(start_server: StartServer, authority: Authority) -> None:
    port = tls(start_server, authority, metrics_tls="off").metrics_port
    assert ask(port, "/livez").status == 200


def shown(port: int) -> bytes:
    return ssl.get_server_certificate(("127.0.0.1", port)).encode()


def test_certificate_rotates_without_a_restart(
    start_server: StartServer, authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    port = tls(start_server, authority).metrics_port
    first = shown(port)
    cert, key = authority.issue("server", "127.0.0.1")
    assert shown(port) == cert.read_bytes() != first
    with caplog.at_level(logging.ERROR):
        key.write_text("no key")
        assert shown(port) == cert.read_bytes()
    assert "the old certificate stays in use" in caplog.text
    authority.issue("server", "127.0.0.1")
    assert shown(port) == cert.read_bytes()
    assert ask(port, "/livez", ssl.create_default_context(cafile=str(authority.ca_file))).status == 200


def test_files_that_cannot_be_used_are_refused_at_start(authority: Authority, tmp_path: Path) -> None:
    cert, _ = authority.issue("server", "127.0.0.1")
    with pytest.raises(SettingError, match="cannot be used"):
        server_context(ServerTls(cert, tmp_path / "missing.key"))


def test_plain_bytes_on_the_tls_port_cost_one_connection(start_server: StartServer, authority: Authority) -> None:
    port = tls(start_server, authority).metrics_port
    with socket.create_connection(("127.0.0.1", port), timeout=60) as client:
        client.sendall(b"GET / HTTP/1.1\r\n\r\n")
        client.settimeout(60)
        while client.recv(4096):
            pass
    assert ask(port, "/livez", ssl.create_default_context(cafile=str(authority.ca_file))).status == 200


@pytest.mark.parametrize("metrics_tls", ["auto", "off"])
def test_tokens_in_clear_are_warned_about(authority: Authority, tmp_path: Path, metrics_tls: str) -> None:
    cert, key = authority.issue("server", "127.0.0.1")
    rules = access_file(tmp_path / "access.toml", ("reader", "read", TOKEN))
    flags = {"host": "::", "auth": "file", "auth_file": rules, "tls_cert_file": cert, "tls_key_file": key}
    settings = load_settings({name: str(value) for name, value in {**flags, "metrics_tls": metrics_tls}.items()})
    assert ("not encrypted" in (warning(settings) or "")) == (metrics_tls == "off")


def test_client_gives_its_token_only_where_nobody_listens(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text(TOKEN + "\n")
    closed = ClientCredentials(token_file=path)
    assert closed.authorization("https://mx-server") == f"Bearer {TOKEN}"
    assert closed.authorization("127.0.0.1") == f"Bearer {TOKEN}"
    assert closed.authorization("mx-server") is None
    assert ClientCredentials(token_file=path, token_in_clear=True).authorization("mx-server") == f"Bearer {TOKEN}"
    assert ClientCredentials().authorization("https://mx-server") is None


def test_page_in_a_browser_that_gives_the_token(guarded: Server, tmp_path: Path) -> None:
    browser = Browser(tmp_path / "profile")
    try:
        browser.open(f"http://any:{TOKEN}@127.0.0.1:{guarded.metrics_port}/")
        browser.wait_until(lambda: browser.text("#state") == "ready", "the page with its data")
        assert json.loads(browser.run("return JSON.stringify(STATUS)")).endswith("/status")
        assert TOKEN not in browser.text("html")
    finally:
        browser.close()

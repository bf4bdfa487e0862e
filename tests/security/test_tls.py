"""TLS and mTLS over real sockets: who is trusted, what rotates, and that nothing falls back to plain."""

from __future__ import annotations

import logging
import shutil
import socket
import ssl
import time
from pathlib import Path

import pytest

from mxbench.stand_ins.authority import Authority
from mxserver.server import Server
from mxserver.wire import ServerRefused, ServerUnreachable, SettingError
from mxserver.wire.calls import ServerClient, server_credentials
from mxserver.wire.credentials import ClientCredentials, ServerTls, certificate_not_after, is_loopback, worker_tls
from tests.security.conftest import IDENTITY, READY, SOURCE, WORKER, StartServer


def tls_flags(pair: tuple[Path, Path], client_ca: Path | None = None) -> dict[str, object]:
    flags: dict[str, object] = {"tls_cert_file": pair[0], "tls_key_file": pair[1]}
    return flags if client_ca is None else {**flags, "tls_client_ca_file": client_ca}


def client_of(
    server: Server, *, https: bool = True, pair: tuple[Path, Path] | None = None, **credentials: object
) -> ServerClient:
    cert, key = pair or (None, None)
    address = f"{'https://' if https else ''}127.0.0.1:{server.port}"
    return ServerClient(
        address,
        timeout_seconds=10,
        credentials=ClientCredentials(cert_file=cert, key_file=key, **credentials),  # type: ignore[arg-type]
    )


def shown_certificate(server: Server) -> bytes:
    """The certificate that a new connection is shown."""
    return ssl.get_server_certificate(("127.0.0.1", server.port)).encode()


# Servers


def test_https_is_encrypted_and_plain_is_refused(start_server: StartServer, authority: Authority) -> None:
    server = start_server(**tls_flags(authority.issue("server", "127.0.0.1")))
    with client_of(server, ca_file=authority.ca_file) as client:
        assert client.health().status == "ok"
    with client_of(server, https=False) as plain, pytest.raises(ServerUnreachable, match="the address with https://"):
        plain.health()


def test_client_of_a_plain_server_does_not_fall_back(start_server: StartServer, authority: Authority) -> None:
    server = start_server()
    with (
        client_of(server, ca_file=authority.ca_file) as client,
        pytest.raises(ServerUnreachable, match="no TLS is spoken there: write the address without https://"),
    ):
        client.health()


def test_server_of_another_authority_is_not_trusted(start_server: StartServer, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    server = start_server(**tls_flags(Authority(tmp_path / "other").issue("server", "127.0.0.1")))
    for trusted in (Authority(tmp_path, "mine").ca_file, None):  # None: the system's, which has no such authority
        with client_of(server, ca_file=trusted) as client, pytest.raises(ServerUnreachable, match="MX_TLS_CA_FILE"):
            client.health()


def test_certificate_for_another_name_is_not_trusted(start_server: StartServer, authority: Authority) -> None:
    server = start_server(**tls_flags(authority.issue("server", "10.0.0.1")))
    with client_of(server, ca_file=authority.ca_file) as client, pytest.raises(ServerUnreachable):
        client.health()


def test_environment_gives_the_credentials(
    start_server: StartServer, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = start_server(**tls_flags(authority.issue("server", "127.0.0.1"), authority.ca_file))
    cert, key = authority.issue("worker")
    monkeypatch.setenv("MX_TLS_CA_FILE", str(authority.ca_file))
    monkeypatch.setenv("MX_TLS_CERT_FILE", str(cert))
    monkeypatch.setenv("MX_TLS_KEY_FILE", str(key))
    with ServerClient(f"https://127.0.0.1:{server.port}") as client:
        assert client.list_sources() == []


# Clients' certificates


def test_client_without_a_certificate_of_the_authority_gets_no_connection(
    start_server: StartServer, authority: Authority, tmp_path: Path
) -> None:
    server = start_server(**tls_flags(authority.issue("server", "127.0.0.1"), authority.ca_file))
    (tmp_path / "other").mkdir()
    stranger = Authority(tmp_path / "other").issue("stranger")
    for pair in (None, stranger):
        with client_of(server, ca_file=authority.ca_file, pair=pair) as client, pytest.raises(ServerUnreachable):
            client.health()
    with client_of(server, ca_file=authority.ca_file, pair=authority.issue("worker")) as client:
        assert client.list_sources() == []


def test_record_belongs_to_the_certificate_it_was_published_with(
    start_server: StartServer, authority: Authority
) -> None:
    server = start_server(**tls_flags(authority.issue("server", "127.0.0.1"), authority.ca_file))
    with (
        client_of(server, ca_file=authority.ca_file, pair=authority.issue("a", "worker-a")) as a,
        client_of(server, ca_file=authority.ca_file, pair=authority.issue("b", "worker-b")) as b,
    ):
        epoch = a.publish(IDENTITY, WORKER, "w").epoch
        for call in (
            lambda: b.publish(IDENTITY, WORKER, "w"),
            lambda: b.update_status(SOURCE, "w", 0, READY),
        ):
            with pytest.raises(ServerRefused, match=r"PERMISSION_DENIED.*another caller than 'certificate:worker-b'"):
                call()
        a.update_status(SOURCE, "w", 0, READY, epoch=epoch)
        assert [r.worker_id for r in b.list_sources(IDENTITY, status=READY)] == ["w"]


# Rotation


def test_new_certificate_is_shown_without_a_restart(
    start_server: StartServer, authority: Authority, tmp_path: Path
) -> None:
    server = start_server(**tls_flags(authority.issue("server", "127.0.0.1")))
    first = shown_certificate(server)
    with client_of(server, ca_file=authority.ca_file) as client:
        client.health()
        cert, _ = authority.issue("server", "127.0.0.1")
        second = shown_certificate(server)
        assert second != first
        assert second.split() == cert.read_bytes().split()
        client.health()  # its connection is what it was


@pytest.mark.parametrize("spoil", ["certificate", "key"])
def test_half_of_a_rotation_leaves_the_old_certificate_in_use(
    start_server: StartServer, authority: Authority, tmp_path: Path, caplog: pytest.LogCaptureFixture, spoil: str
) -> None:
    cert, key = authority.issue("server", "127.0.0.1")
    server = start_server(**tls_flags((cert, key)))
    first = shown_certificate(server)
    (tmp_path / "next").mkdir()
    authority._folder = tmp_path / "next"
    next_cert, next_key = authority.issue("server", "127.0.0.1")
    shutil.copy(next_cert if spoil == "certificate" else next_key, cert if spoil == "certificate" else key)
    with caplog.at_level(logging.ERROR):
        assert shown_certificate(server) == first
    assert "the old certificate stays in use" in caplog.text
    shutil.copy(next_key if spoil == "certificate" else next_cert, key if spoil == "certificate" else cert)
    assert shown_certificate(server) != first


def test_client_shows_its_new_certificate_without_a_restart(
    start_server: StartServer, authority: Authority, tmp_path: Path
) -> None:
    server = start_server(**tls_flags(authority.issue("server", "127.0.0.1"), authority.ca_file))
    with client_of(server, ca_file=authority.ca_file, pair=authority.issue("worker", "old-name")) as client:
        client.publish(IDENTITY, WORKER, "old")
        client.health()
        authority.issue("worker", "new-name")
        client.publish(IDENTITY, WORKER, "new")
        with pytest.raises(ServerRefused, match="certificate:new-name"):
            client.update_status(SOURCE, "old", 0, READY)


# Settings


def test_files_that_do_not_fit_are_refused_with_their_names(authority: Authority, tmp_path: Path) -> None:
    cert, key = authority.issue("a")
    _, other_key = authority.issue("b")
    text = tmp_path / "text.pem"
    text.write_text("no PEM")
    missing = tmp_path / "missing.pem"
    for tls, named in (
        (ServerTls(cert, other_key), "KEY_VALUES_MISMATCH|key values mismatch"),
        (ServerTls(missing, key), "missing.pem"),
        (ServerTls(text, key), "text.pem"),
        (ServerTls(cert, key, text), "text.pem"),
        (ServerTls(cert, key, missing), "missing.pem"),
    ):
        with pytest.raises(SettingError, match=named):
            server_credentials(tls)


def test_client_with_unusable_files_is_told_at_its_call(authority: Authority, tmp_path: Path) -> None:
    with (
        ServerClient("https://127.0.0.1:1", credentials=ClientCredentials(ca_file=tmp_path / "none.pem")) as client,
        pytest.raises(ServerUnreachable, match=r"none\.pem cannot be read"),
    ):
        client.health()


@pytest.mark.parametrize(
    ("environ", "named"),
    [
        ({"MX_TLS_CERT_FILE": "/c"}, "belong together"),
        ({"MX_TLS_KEY_FILE": "/k"}, "belong together"),
        ({"MX_TLS_CLIENT_CA_FILE": "/ca"}, "needs MX_TLS_CERT_FILE"),
        ({"MX_AUTH_TOKEN_IN_CLEAR": "perhaps"}, "must be 1 or 0"),
    ],
)
def test_worker_settings_that_do_not_fit_are_refused(environ: dict[str, str], named: str) -> None:
    with pytest.raises(SettingError, match=named):
        worker_tls(environ)


def test_worker_serves_tls_where_it_has_a_certificate() -> None:
    assert worker_tls({}) is None
    files = {"MX_TLS_CERT_FILE": "/c", "MX_TLS_KEY_FILE": "/k"}
    assert worker_tls(files) == ServerTls(Path("/c"), Path("/k"))
    assert worker_tls({**files, "MX_TLS_CLIENT_CA_FILE": "/ca"}) == ServerTls(Path("/c"), Path("/k"), Path("/ca"))
    assert ClientCredentials.from_environ(files).peers_use_tls
    assert not ClientCredentials.from_environ({}).peers_use_tls


@pytest.mark.parametrize(
    ("address", "loopback"),
    [
        ("127.0.0.1:1", True),
        ("127.9.9.9", True),
        ("[::1]:1", True),
        ("::1", True),
        ("localhost:1", True),
        ("LOCALHOST.:1", True),
        ("unix:/run/s", True),
        ("0.0.0.0", False),  # noqa: S104
        ("::", False),
        ("10.0.0.1:1", False),
        ("[fd00::1]:1", False),
        ("localhost.evil.example:1", False),
        ("127.0.0.1.evil.example:1", False),
    ],
)
def test_loopback_is_what_cannot_leave_the_machine(address: str, loopback: bool) -> None:
    assert is_loopback(address) is loopback


def test_old_protocols_are_refused(start_server: StartServer, authority: Authority) -> None:
    server = start_server(**tls_flags(authority.issue("server", "127.0.0.1")))
    context = ssl.create_default_context(cafile=str(authority.ca_file))
    with (
        socket.create_connection(("127.0.0.1", server.port)) as plain,
        context.wrap_socket(plain, server_hostname="127.0.0.1") as secure,
    ):
        assert secure.version() in ("TLSv1.2", "TLSv1.3")


def test_end_of_a_certificate_is_known(authority: Authority, tmp_path: Path) -> None:
    """By a function that Python has for its own tests alone; there is none for others."""
    certificate, _ = authority.issue("server", "127.0.0.1")
    left_seconds = (certificate_not_after(Path(certificate)) or 0) - time.time()
    assert 0 < left_seconds < 20 * 365 * 86400
    assert certificate_not_after(tmp_path / "none") is None

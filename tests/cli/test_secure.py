"""`mx` against a server that takes TLS, clients' certificates and tokens: by flags and by the environment."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import pytest

from mxbench.stand_ins.authority import Authority
from mxserver.server import Server
from mxserver.wire.calls import ServerClient
from mxserver.wire.credentials import ClientCredentials
from tests.cli.mx_process import Ran, mx
from tests.security.conftest import IDENTITY, WORKER, StartServer, access_file, authority, start_server

__all__ = ["authority", "start_server"]  # fixtures

READER, WORKER_TOKEN = "r" * 40, "w" * 40


class Place(NamedTuple):
    server: Server
    address: str
    page: str
    flags: tuple[str, ...]  # all that the server wants


@pytest.fixture
def place(start_server: StartServer, authority: Authority, tmp_path: Path) -> Place:
    cert, key = authority.issue("server", "127.0.0.1")
    rules = access_file(tmp_path / "access.toml", ("reader", "read", READER), ("worker", "publish", WORKER_TOKEN))
    server = start_server(
        tls_cert_file=cert, tls_key_file=key, tls_client_ca_file=authority.ca_file, auth="file", auth_file=rules
    )
    for name, token in (("reader", READER), ("worker", WORKER_TOKEN)):
        (tmp_path / name).write_text(token)
    own = authority.issue("client")
    credentials = ClientCredentials(authority.ca_file, *own, token_file=tmp_path / "worker")
    with ServerClient(f"https://127.0.0.1:{server.port}", credentials=credentials) as client:
        client.publish(IDENTITY, WORKER, "w0")
    flags = ("--tls-ca", authority.ca_file, "--tls-cert", own[0], "--tls-key", own[1])
    given = (*map(str, flags), "--token-file", str(tmp_path / "reader"))
    return Place(server, f"https://127.0.0.1:{server.port}", f"https://127.0.0.1:{server.metrics_port}", given)


def findings(ran: Ran) -> dict[str, tuple[str, str]]:
    return {finding["name"]: (finding["state"], finding["do"]) for finding in json.loads(ran.out)["findings"]}


def test_all_commands_by_flags(place: Place) -> None:
    status = mx("status", "--server", place.address, *place.flags, "--page", place.page, "--json")
    assert (status.code, status.err) == (0, "")
    facts = status.json()
    assert (facts["page_problem"], facts["loads"]) == ("", [])
    assert facts["models"][0]["initializing"] == 1
    sources = mx("sources", "--server", place.address, *place.flags, "--json")
    assert [source["worker_id"] for source in sources.json()["sources"]] == ["w0"]
    doctor = mx("doctor", "--server", place.address, *place.flags, "--json")
    assert {name: findings(doctor)[name][0] for name in ("server", "access", "clock")} == {
        "server": "ok",
        "access": "ok",
        "clock": "ok",
    }
    assert mx("models", "--server", place.address, *place.flags, "list", "--json").code == 0


def test_all_of_it_by_the_environment(place: Place) -> None:
    given = dict(zip(place.flags[::2], place.flags[1::2], strict=True))
    ran = mx(
        "status",
        "--page",
        place.page,
        "--json",
        MODEL_EXPRESS_URL=place.address,
        MX_TLS_CA_FILE=given["--tls-ca"],
        MX_TLS_CERT_FILE=given["--tls-cert"],
        MX_TLS_KEY_FILE=given["--tls-key"],
        MX_AUTH_TOKEN_PATH=given["--token-file"],
    )
    assert (ran.code, ran.json()["page_problem"]) == (0, "")


def test_without_a_token_it_is_refused_and_doctor_says_what_to_do(place: Place) -> None:
    flags = place.flags[: place.flags.index("--token-file")]
    ran = mx("sources", "--server", place.address, *flags)
    assert (ran.code, "MX_AUTH_TOKEN_PATH" in ran.err) == (5, True)
    doctor = mx("doctor", "--server", place.address, *flags, "--json")
    assert doctor.code == 1
    state, do = findings(doctor)["access"]
    assert (state, "--token-file" in do) == ("fail", True)


def test_without_tls_or_trust_doctor_says_what_to_do(place: Place) -> None:
    plain = mx("doctor", "--server", place.address.removeprefix("https://"), "--json")
    assert (plain.code, "needs https://" in findings(plain)["server"][1]) == (1, True)
    untrusted = mx("doctor", "--server", place.address, "--json")
    assert (untrusted.code, "--tls-ca" in findings(untrusted)["server"][1]) == (1, True)


def test_reader_may_not_delete(place: Place) -> None:
    ran = mx("models", "--server", place.address, *place.flags, "rm", "org/x")
    assert ran.code != 0
    assert "reader has the role read" in ran.err


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--server", "127.0.0.1:1", "--tls-ca", "/ca.pem"), "write the address as https://127.0.0.1:1"),
        (("--server", "https://127.0.0.1:1", "--tls-cert", "/c.pem"), "belong together"),
    ],
)
def test_flags_that_would_do_nothing_are_usage_errors(arguments: tuple[str, ...], text: str) -> None:
    ran = mx("sources", *arguments)
    assert (ran.code, text in ran.err) == (2, True), ran.err


def test_token_is_kept_from_a_connection_in_clear(tmp_path: Path) -> None:
    (tmp_path / "token").write_text(READER)
    ran = mx("status", "--server", "mx.invalid:1", "--token-file", str(tmp_path / "token"))
    assert ran.code == 3
    assert "the token is not sent to mx.invalid:1" in ran.err
    assert READER not in ran.err
    told = mx("status", "--server", "mx.invalid:1", "--token-file", str(tmp_path / "token"), "--token-in-clear")
    assert "the token is not sent" not in told.err

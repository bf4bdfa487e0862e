"""publish and fetch under TLS and tokens, by the settings of workers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mxbench.stand_ins.authority import Authority
from mxcore import fetch, publish
from mxcore.errors import SourceUnreachable
from mxserver.wire import ServerRefused, ServerUnreachable
from tests.exchange.conftest import PATIENT
from tests.security.conftest import StartServer, access_file, authority, start_server  # noqa: F401 - fixtures

SETTINGS = {"MX_WORKER_HOST": "127.0.0.1", "MX_TRANSPORT": "tcp", **PATIENT}


def test_tls_and_a_token_are_needed_and_enough(
    start_server: StartServer,  # noqa: F811
    authority: Authority,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    certificate, key = authority.issue("server", "127.0.0.1")
    access = access_file(tmp_path / "access.toml", ("trainer", "publish", "a-token-of-32-characters-or-more!"))
    server = start_server(tls_cert_file=certificate, tls_key_file=key, auth="file", auth_file=access)
    address = f"https://127.0.0.1:{server.port}"
    weights = {"a": np.arange(100_000)}

    with pytest.raises(ServerUnreachable, match="MX_TLS_CA_FILE"):
        publish("m", weights, 1, server=address, settings=SETTINGS)
    monkeypatch.setenv("MX_TLS_CA_FILE", str(authority.ca_file))
    for call in (
        lambda: publish("m", weights, 1, server=address, settings=SETTINGS),
        lambda: fetch("m", server=address, settings=SETTINGS),
    ):
        with pytest.raises(ServerRefused, match="UNAUTHENTICATED"):
            call()
    (tmp_path / "token").write_text("a-token-of-32-characters-or-more!")
    monkeypatch.setenv("MX_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    own, own_key = authority.issue("worker", "mx-worker")
    monkeypatch.setenv("MX_TLS_PEER_NAME", "mx-worker")
    for name, path in {"CERT": own, "KEY": own_key, "CLIENT_CA": authority.ca_file}.items():
        monkeypatch.setenv(f"MX_TLS_{name}_FILE", str(path))
    with publish("m", weights, 1, server=address, settings=SETTINGS):
        found = fetch("m", 1, server=address, settings=SETTINGS, framework="numpy")
        np.testing.assert_array_equal(found["a"], weights["a"])
        monkeypatch.setenv("MX_TLS_PEER_NAME", "somebody-else")
        with pytest.raises(SourceUnreachable):
            fetch("m", 1, server=address, settings=SETTINGS)

"""The workers' own services under mTLS: a real exchange, and who is kept out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from mxbench.stand_ins.authority import Authority
from mxcore.errors import SourceUnreachable
from mxcore.transfer.move import Source, SourceClient
from mxcore.transfer.serve import WorkerServer
from mxserver.wire import SettingError
from tests.transfer.conftest import (
    StartWorker,
    start_worker,  # noqa: F401 - a fixture
)
from tests.transfer.serve.test_holder import SOURCE_ID, WORKER_ID, Holder, holder, new_server  # noqa: F401 - a fixture

NAME = "mx-worker"


def environ_of(authority: Authority, name: str = "worker") -> dict[str, str]:
    """What all workers of a fleet are given; their certificates have one name, for they are called by address."""
    cert, key = authority.issue(name, NAME)
    files = {"MX_TLS_CERT_FILE": cert, "MX_TLS_KEY_FILE": key}
    files |= {"MX_TLS_CA_FILE": authority.ca_file, "MX_TLS_CLIENT_CA_FILE": authority.ca_file}
    return {**{variable: str(path) for variable, path in files.items()}, "MX_TLS_PEER_NAME": NAME}


@pytest.fixture
def fleet(authority: Authority, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    environ = environ_of(authority)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    return environ


@pytest.fixture
def source(fleet: dict[str, str], holder: Holder) -> Iterator[Source]:  # noqa: F811
    server: WorkerServer = new_server(holder)
    yield Source(SOURCE_ID, WORKER_ID, 3, server.endpoint)
    server.stop()


def prepare(source: Source) -> str:
    with SourceClient(source, timeout_seconds=10) as client:
        return client.prepare()


def test_workers_with_certificates_exchange(start_worker: StartWorker, authority: Authority) -> None:  # noqa: F811
    environ = environ_of(authority)
    source = start_worker(environ=environ, seed=7).serve()
    report = start_worker(environ=environ, seed=2).ask(do="receive", sources=[vars(source)])
    assert report.get("equal") is True, report


def test_worker_of_the_fleet_is_taken(source: Source, holder: Holder) -> None:  # noqa: F811
    with SourceClient(source, timeout_seconds=10) as client:
        lease_id = client.prepare()
        assert holder._leases[lease_id].reader == f"ipv4:127.0.0.1 {NAME}"  # by its address and its certificate


@pytest.mark.parametrize("missing", ["MX_TLS_CERT_FILE MX_TLS_KEY_FILE", "MX_TLS_PEER_NAME", "MX_TLS_CA_FILE"])
def test_worker_that_lacks_a_part_gets_no_connection(
    source: Source, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    """Without its certificate it calls in clear and is refused; without a name or CA it does not trust the holder."""
    for name in missing.split():
        monkeypatch.delenv(name)
    with pytest.raises(SourceUnreachable):
        prepare(source)


def test_stranger_is_kept_out(source: Source, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    for name, value in environ_of(Authority(tmp_path / "other"), "stranger").items():
        if name != "MX_TLS_CA_FILE":
            monkeypatch.setenv(name, value)
    with pytest.raises(SourceUnreachable):
        prepare(source)


def test_worker_with_an_unusable_certificate_serves_nothing(
    fleet: dict[str, str],
    holder: Holder,  # noqa: F811
) -> None:
    Path(fleet["MX_TLS_CERT_FILE"]).write_text("no PEM")
    with pytest.raises(SettingError, match=r"worker\.crt and key .* cannot be used"):
        new_server(holder)
    with pytest.raises(SourceUnreachable, match=r"cannot be called: .*worker\.crt"):
        prepare(Source(SOURCE_ID, WORKER_ID, 3, "127.0.0.1:1"))

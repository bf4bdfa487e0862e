"""A worker that starts before its server's name resolves (a pod before its Service) can be reached all the same."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from mxcore.settings import OwnAddress, load_settings
from mxserver.wire.calls import ServerClient
from mxserver.wire.proto import p2p_pb2
from tests.transfer.conftest import RunningServer, StartWorker, wait_for
from tests.transfer.memory import identity

NAME = "mx-server.mx.test"
OWN_HOSTS = ("unshare", "--mount", "sh", "-c", 'mount --bind "$0" /etc/hosts && exec "$@"')


def test_a_name_that_resolves_later(server: RunningServer, start_worker: StartWorker, tmp_path: Path) -> None:
    """It advertised 127.0.0.1 for life, and listened nowhere else (proofs/fleet/t12.py)."""
    hosts = tmp_path / "hosts"
    hosts.write_text("127.0.0.1 localhost\n")
    port = server.address.rpartition(":")[2]
    settings = {"MX_SERVER_ADDRESS": f"{NAME}:{port}", "MX_HEARTBEAT_INTERVAL_SECS": 0.2, "MX_SERVER_TIMEOUT_SECS": 5}
    worker = start_worker(launcher=(*OWN_HOSTS, str(hosts)), seed=7, settings=settings)
    guess = worker.serve().endpoint
    expected = load_settings({"MX_SERVER_ADDRESS": "no-such-host.invalid:1"}, {}).own_address()
    assert expected.guessed
    assert guess.rpartition(":")[0] == expected.host
    for place in {"127.0.0.1", expected.host}:
        socket.create_connection((place, int(guess.rpartition(":")[2])), timeout=60).close()
    hosts.write_text(f"127.0.0.1 localhost {NAME}\n")
    with ServerClient(server.address, timeout_seconds=60) as client:

        def advertised() -> str:
            found = client.list_sources(identity(), status=p2p_pb2.SOURCE_STATUS_READY)
            return found[0].worker_grpc_endpoint if found else ""

        assert wait_for(advertised)
        wait_for(lambda: advertised() == f"127.0.0.1:{guess.rpartition(':')[2]}")


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
def test_a_guess_is_never_this_host_alone(host: str) -> None:
    assert OwnAddress(host).is_loopback
    assert not OwnAddress(host, guessed=True).is_loopback

"""A server that takes connections and gives no answer costs a start its deadline once; heartbeats go on trying."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from mxserver.server import Server
from mxserver.settings import load_settings
from mxserver.wire import ServerUnreachable
from tests.transfer.conftest import wait_for
from tests.transfer.fleet_member import SEED, Member


@pytest.fixture
def silent() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener


@pytest.fixture
def alone(silent: socket.socket) -> Iterator[tuple[Member, list[str]]]:
    """A member of the silent server, and its calls, but for those of heartbeats."""
    address = f"127.0.0.1:{silent.getsockname()[1]}"
    member, called = Member(address, SEED, 1, MX_SERVER_TIMEOUT_SECS=0.3, MX_WORKER_HOST="127.0.0.1"), []
    client: Any = member.membership._client
    call = client._call

    def counted(name: str, method: Any, request: Any) -> Any:
        if threading.current_thread().name != "mx-heartbeat":
            called.append(name)
        return call(name, method, request)

    client._call = counted
    yield member, called
    member.membership.close()


def test_a_start_waits_for_it_once_and_is_known_when_it_answers(
    alone: tuple[Member, list[str]], silent: socket.socket
) -> None:
    member, called = alone
    assert not member.membership.join()
    assert member.membership.wait_for_source() == []  # read storage
    assert member.membership.find_sources() == []
    assert member.membership.differs_least() == ""
    with pytest.raises(ServerUnreachable, match="only heartbeats"):
        member.membership.published_ranks(ready=True)
    member.serve()
    member.membership.withdraw()
    member.serve()
    assert called == ["PublishMetadata"]
    port = silent.getsockname()[1]
    silent.close()
    running = Server(load_settings({"host": "127.0.0.1", "port": str(port), "store": "memory", "drain_seconds": "1"}))
    try:
        wait_for(lambda: member.membership.published)
        assert member.membership.published_ranks(ready=True) == {0}  # it is asked again
        member.membership.close()
    finally:
        running.close()


def test_another_worker_of_the_process_does_not_wait_for_it_either(alone: tuple[Member, list[str]]) -> None:
    first, _ = alone
    first.membership.join()
    second = Member(first.membership.settings.server_address or "", SEED, 1, MX_SERVER_TIMEOUT_SECS=0.3)
    called: list[str] = []
    client: Any = second.membership._client

    def never(name: str, method: Any, request: Any) -> None:
        called.append(threading.current_thread().name)
        raise ServerUnreachable(f"{name}: no answer")

    client._call = never
    try:
        assert not second.membership.join()
        assert second.membership.find_sources() == []
        assert "MainThread" not in called
    finally:
        second.membership.close()

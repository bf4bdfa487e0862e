"""Workers that wait hear of sources on a stream; without one they ask, and come back after it broke."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from typing import Any

import grpc
import pytest

from mxcore.transfer.member import Membership
from mxcore.transfer.member.watched_sources import WatchedSources
from mxserver.server import Server
from mxserver.settings import load_settings
from mxserver.wire import WireError
from tests.transfer.conftest import ServerProcess, wait_for
from tests.transfer.fleet_member import NewMember


@pytest.fixture
def watching() -> Iterator[Callable[..., WatchedSources]]:
    with ExitStack() as opened:

        def begin(member: Membership, *, wants_turn: bool = False) -> WatchedSources:
            watched = member._watching(opened, wants_turn=wants_turn)
            assert watched is not None
            return watched

        yield begin


def test_a_worker_that_waits_asks_nothing(
    new_member: NewMember, watching: Callable[..., WatchedSources], monkeypatch: pytest.MonkeyPatch
) -> None:
    waits, serves = new_member(), new_member(1)
    waits.membership.join()
    assert waits.membership.wait_for_source() == []  # it is the first one: it reads storage
    late = new_member()
    late.membership.join()
    asked: Counter[str] = Counter()
    client: Any = late.membership._client
    call = client._call

    def counted(name: str, method: Any, request: Any) -> Any:
        asked[name] += 1
        return call(name, method, request)

    monkeypatch.setattr(client, "_call", counted)
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.extend(late.membership.wait_for_source()))
    watched = watching(late.membership)
    thread.start()
    wait_for(lambda: watched.reader)  # told as this one is, it waits
    serves.serve()
    thread.join(60)
    assert [source.worker_id for source in found] == [serves.membership.worker_id]
    assert asked["ListSources"] == 0
    assert asked["TakeStorageTurn"] <= 1


def test_a_stream_that_broke_is_opened_again(
    new_member: NewMember, server_process: ServerProcess, watching: Callable[..., WatchedSources]
) -> None:
    waits, serves = new_member(), new_member(1)
    for each in (waits, serves):
        each.membership.join()
    watched = watching(waits.membership)
    wait_for(lambda: watched.is_told)
    server_process.stop()
    wait_for(lambda: not watched.is_told)
    server_process.restart()
    serves.serve()

    def complete() -> list[Any]:
        with suppress(WireError):  # while there is no stream, the server is asked
            return [source for source in watched.holders() or () if not source.receiving]
        return []

    wait_for(complete)
    wait_for(lambda: watched.is_told)


def test_an_older_server_is_asked_from_time_to_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server as it was before there were streams: waiting and receiving work, at the pace of questions."""
    monkeypatch.setattr("mxserver.services.WatchService.add_to", lambda service, server: None)
    running = Server(load_settings({"host": "127.0.0.1", "port": "0", "store": "memory", "drain_seconds": "1"}))
    from tests.transfer.conftest import Member

    address = f"127.0.0.1:{running.port}"
    members = [Member(address, seed, 1) for seed in (1, None)]
    serves, waits = members
    try:
        assert serves.membership.wait_for_source() == []
        waits.membership.join()
        found: list[Any] = []
        thread = threading.Thread(target=lambda: found.extend(waits.membership.wait_for_source()))
        thread.start()
        serves.serve()
        thread.join(60)
        assert [source.worker_id for source in found] == [serves.membership.worker_id]
        with ExitStack() as opened:
            watched = waits.membership._watching(opened)
            assert watched is not None
            wait_for(lambda: [source.worker_id for source in watched.holders() or ()])
            assert not watched.is_told
            assert watched.holders() is None  # not again at once
    finally:
        for member in members:
            member.membership.close()
        running.close()


def test_grpcio_has_what_streams_need() -> None:
    from grpc import _server

    for name in ("_possibly_finish_call", "_SEND_MESSAGE_TOKEN", "_get_initial_metadata_operation", "_abort"):
        assert hasattr(_server, name), f"grpcio {grpc.__version__}"

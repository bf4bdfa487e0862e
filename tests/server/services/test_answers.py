"""Answers that nobody takes: their bytes are limited, and who takes his gets one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from unittest.mock import create_autospec

import grpc
import pytest

from mxserver.calls import answers
from mxserver.server import Server
from mxserver.settings import load_settings
from mxserver.wire import ServerRefused
from mxserver.wire.calls import ServerClient, source_id
from mxserver.wire.proto import p2p_pb2
from tests.adversary.hostile import P2P, Closed

MIB = 1024 * 1024
IDENTITY = p2p_pb2.SourceIdentity(model_name="m")
BLOB = bytes(range(256)) * (3 * 4096)
ROOM = answers.KEPT_FOR_SMALL_BYTES + 8 * MIB


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(answers, "QUICK_SECONDS", 0.05)
    monkeypatch.setattr(answers, "SLOW_CLIENTS_BYTES_PER_SECOND", 1024 * MIB)
    started = Server(
        load_settings({"host": "127.0.0.1", "port": "0", "store": "memory", "limits": f"answer_bytes={ROOM}"})
    )
    yield started
    started.close()


def until(condition: Callable[[], bool]) -> None:
    pause = threading.Event()
    for _ in range(6000):
        if condition():
            return
        pause.wait(0.01)
    raise AssertionError("the condition did not come true within a minute")


def is_taken(client: ServerClient) -> bool:
    """Whether the record comes whole; on a machine that is busy, it may count as not taken in time."""
    try:
        taken = client.get_metadata(source_id(IDENTITY), "w")
    except ServerRefused:
        return False
    return taken is not None and taken.worker.nixl_metadata == BLOB


def test_records_that_nobody_takes_are_limited(server: Server) -> None:
    """A hundred calls for 3 MiB, of which at most 8 MiB are under way; each would hold twice its bytes for ever."""
    under_way = server._answers
    with ServerClient(f"127.0.0.1:{server.port}") as client:
        client.publish(IDENTITY, p2p_pb2.WorkerMetadata(nixl_metadata=BLOB), "w")
        request = p2p_pb2.GetMetadataRequest(mx_source_id=source_id(IDENTITY), worker_id="w")
        hostile = [Closed(("127.0.0.1", server.port), ()) for _ in range(4)]
        for one in hostile:
            assert one.ask(f"{P2P}GetMetadata", request.SerializeToString(), 25)
        until(lambda: under_way.bytes_under_way > 3 * MIB)
        until(lambda: is_taken(client) and under_way.bytes_under_way <= 8 * MIB)
        assert under_way.bytes_under_way > 0  # the others are still there
        assert [row.worker_id for row in client.list_sources()] == ["w"]
        for one in hostile:
            one.close()
        until(lambda: under_way.bytes_under_way == 0)


def test_an_answer_whose_caller_left_while_it_waited_is_not_made() -> None:
    """All that waited would be made at once, without room, when a hostile connection ends."""
    gone = create_autospec(grpc.ServicerContext, instance=True)
    gone.is_active.return_value = gone.add_callback.return_value = False
    gone.abort.side_effect = InterruptedError
    under_way = answers.AnswersUnderWay()
    with pytest.raises(InterruptedError):
        under_way.reserve(gone, 95 * MIB)
    assert gone.abort.call_args.args[0] is grpc.StatusCode.CANCELLED
    assert under_way.bytes_under_way == 0


def test_an_answer_whose_caller_leaves_while_it_is_made_takes_room_until_it_is() -> None:
    """Else many that are made for nobody are in memory at the same time."""
    context = create_autospec(grpc.ServicerContext, instance=True)
    under_way = answers.AnswersUnderWay()

    def made(request: bytes, context: grpc.ServicerContext) -> bytes:
        under_way.reserve(context, 5 * MIB)
        [ended] = context.add_callback.call_args.args
        ended()
        assert under_way.bytes_under_way == 5 * MIB
        return bytes(6 * MIB)

    handler = under_way._replacement("method", grpc.unary_unary_rpc_method_handler(made))
    assert len(handler.unary_unary(b"", context)) == 6 * MIB
    assert under_way.bytes_under_way == 0


def test_an_answer_that_is_made_takes_room_until_the_call_ends() -> None:
    context = create_autospec(grpc.ServicerContext, instance=True)
    under_way = answers.AnswersUnderWay()
    handler = under_way._replacement("method", grpc.unary_unary_rpc_method_handler(lambda request, context: bytes(MIB)))
    handler.unary_unary(b"", context)
    assert under_way.bytes_under_way == MIB
    [ended] = context.add_callback.call_args.args
    ended()
    assert under_way.bytes_under_way == 0


def test_an_answer_that_finds_no_room_is_refused_with_the_limit(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers, "PATIENCE_SECONDS", 0.1)
    monkeypatch.setattr(answers, "QUICK_SECONDS", 3600.0)  # nobody is too slow
    with ServerClient(f"127.0.0.1:{server.port}") as client:
        client.publish(IDENTITY, p2p_pb2.WorkerMetadata(nixl_metadata=BLOB), "w")
        request = p2p_pb2.GetMetadataRequest(mx_source_id=source_id(IDENTITY), worker_id="w")
        hostile = Closed(("127.0.0.1", server.port), ())
        assert hostile.ask(f"{P2P}GetMetadata", request.SerializeToString(), 2)
        until(lambda: server._answers.bytes_under_way > 6 * MIB)
        with pytest.raises(
            ServerRefused, match=r"are under way to others; the limit is answer_bytes=\d+, which MX_SERVER_"
        ):
            client.get_metadata(source_id(IDENTITY), "w")
        hostile.close()

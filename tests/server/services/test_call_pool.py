"""Calls get a thread when their request is there, and take turns by host and by connection."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import cast

import grpc
import pytest
from google.protobuf.message import DecodeError

from mxserver.calls.arriving import ArrivingCall
from mxserver.calls.call_pool import _Turns
from mxserver.calls.nested import has_more_messages, split_off, without_large_fields
from mxserver.calls.pools import POOLS
from mxserver.calls.receiving import LargeRequests, Receiving
from mxserver.limits import DEFAULT
from mxserver.server import Server
from mxserver.wire.calls import ServerClient
from mxserver.wire.proto import p2p_pb2, record_pb2

P2P = "/model_express.p2p.P2pService/"
METHODS = (
    f"{P2P}UpdateStatus",
    f"{P2P}ListSources",
    f"{P2P}PublishMetadata",
    "/model_express.mx.FleetService/TakeStorageTurn",
    "/model_express.model.ModelService/ListModelFiles",
    "/model_express.health.HealthService/GetHealth",
)
READY = p2p_pb2.SOURCE_STATUS_READY


def test_requests_that_never_come_hold_no_thread(server: Server, client: ServerClient) -> None:
    """More of them than there are threads, for each kind of call, from a connection of their own."""
    published = client.publish(p2p_pb2.SourceIdentity(model_name="m"), p2p_pb2.WorkerMetadata(), "w")
    over = threading.Event()

    def nothing() -> Iterator[bytes]:
        over.wait(120)
        yield from ()

    most = max(kind.threads for kind in POOLS.values()) + 8
    with grpc.insecure_channel(client.address, [("grpc.use_local_subchannel_pool", 1)]) as channel:
        calls = [channel.stream_unary(method).future(nothing()) for method in METHODS for _ in range(most)]
        try:
            for _ in range(3):
                client.update_status(published.mx_source_id, "w", 0, READY)
                assert [one.worker_id for one in client.list_sources()] == ["w"]
                assert client.health().status == "ok"
            client.publish(p2p_pb2.SourceIdentity(model_name="m"), p2p_pb2.WorkerMetadata(), "w")
        finally:
            over.set()
            for call in calls:
                call.cancel()


def test_a_call_without_a_request_is_told_so(server: Server, client: ServerClient) -> None:
    with grpc.insecure_channel(client.address) as channel, pytest.raises(grpc.RpcError) as refused:
        channel.stream_unary(f"{P2P}ListSources")(iter(()), timeout=60)
    assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize(
    ("method", "body", "status"),
    [
        (f"{P2P}UpdateStatus", bytes(DEFAULT.request_bytes + 1), grpc.StatusCode.RESOURCE_EXHAUSTED),
        (f"{P2P}ListSources", b"\xff", grpc.StatusCode.INTERNAL),
        ("/model_express.model.ModelService/EnsureModelDownloaded", b"\xff", grpc.StatusCode.INTERNAL),
    ],
)
def test_requests_that_are_too_long_or_no_requests(
    client: ServerClient, server: Server, method: str, body: bytes, status: grpc.StatusCode
) -> None:
    with grpc.insecure_channel(client.address) as channel, pytest.raises(grpc.RpcError) as refused:
        list(channel.unary_stream(method)(body, timeout=60))
    assert refused.value.code() is status
    assert method in refused.value.details()


def test_turns_go_by_host_and_then_by_connection() -> None:
    """One host's hundred calls over two connections, and one of another host."""
    turns = _Turns()
    names = [("a", f"a:{n % 2}", n) for n in range(100)] + [("b", "b:0", 100)]
    for host, connection, number in names:
        turns.add(cast(ArrivingCall, SimpleNamespace(host=host, connection=connection, number=number)))
    taken = [cast(SimpleNamespace, turns.take()).number for _ in range(101)]
    assert taken[:4] == [0, 100, 1, 2]
    assert sorted(taken) == list(range(101))
    assert not turns


def test_parts_are_counted_before_they_take_memory(client: ServerClient, server: Server) -> None:
    """Of what the server reads; tensors it does not (tests/security/test_admission.py)."""
    identity = b"\x52\x00" * (DEFAULT.request_parts + 1)
    with grpc.insecure_channel(client.address) as channel, pytest.raises(grpc.RpcError) as refused:
        channel.unary_unary(f"{P2P}PublishMetadata")(b"\x0a" + _varint(len(identity)) + identity, timeout=60)
    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "request_parts=200000, which MX_SERVER_LIMITS of the server raises" in refused.value.details()
    tensors = [p2p_pb2.TensorDescriptor(name=f"model.layers.{n}.weight", addr=n, size=1 << 20) for n in range(60_000)]
    client.publish(p2p_pb2.SourceIdentity(model_name="m"), p2p_pb2.WorkerMetadata(tensors=tensors), "w")


def _varint(number: int) -> bytes:
    parts = bytearray()
    while number > 0x7F:
        parts.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes((*parts, number))


@pytest.mark.parametrize(
    ("parts", "most", "more"), [(0, 0, False), (5, 5, False), (6, 5, True), (1000, 999, True), (1000, 1000, False)]
)
def test_parts_at_the_limit(parts: int, most: int, more: bool) -> None:
    """Half of them two levels deep."""
    tensors = [p2p_pb2.TensorDescriptor(name="t")] * (parts // 2)
    request = p2p_pb2.PublishMetadataRequest(identity=p2p_pb2.SourceIdentity(model_name="m"))
    for n in range(parts - parts // 2):
        request.identity.extra_parameters[str(n)] = "x"
    request.worker.tensors.extend(tensors)
    around = 2  # identity and worker themselves
    assert has_more_messages(request.SerializeToString(), request.DESCRIPTOR, most + around) is more


@pytest.mark.parametrize("data", [b"\x12", b"\x12\xff", b"\x12\x05\x1a", b"\x0f", b"\x12\x02\x1a\x7f", b"\x80" * 30])
def test_counting_ends_where_nothing_is_well_formed(data: bytes) -> None:
    assert not has_more_messages(data, p2p_pb2.PublishMetadataRequest.DESCRIPTOR, 100)


@pytest.mark.parametrize("data", [b"\x08\x01" * 20_000, b"\x09" + bytes(8)])
def test_fields_that_are_no_messages_take_time_as_well(data: bytes) -> None:
    assert has_more_messages(data, p2p_pb2.PublishMetadataRequest.DESCRIPTOR, 100) is (len(data) > 9)


def test_a_field_is_split_off_and_comes_together_again() -> None:
    """Two of it are one, as by protobuf's rules; what is cut off stays for the parser."""
    first, second = p2p_pb2.WorkerMetadata(worker_rank=3), p2p_pb2.WorkerMetadata(nixl_metadata=b"x" * 300)
    whole = p2p_pb2.PublishMetadataRequest(
        identity=p2p_pb2.SourceIdentity(model_name="m"), worker=first, worker_id="w", epoch=2**60
    )
    data = whole.SerializeToString() + b"\x12" + _varint(second.ByteSize()) + second.SerializeToString()
    rest, worker = split_off(data, 2)
    whole.ClearField("worker")
    assert p2p_pb2.PublishMetadataRequest.FromString(rest) == whole
    assert worker is not None
    assert p2p_pb2.WorkerMetadata.FromString(worker) == p2p_pb2.WorkerMetadata(worker_rank=3, nixl_metadata=b"x" * 300)
    assert split_off(rest, 2) == (rest, None)
    for cut in (data[:-1], data + b"\x0f"):
        with pytest.raises(DecodeError):
            p2p_pb2.PublishMetadataRequest.FromString(split_off(cut, 2)[0])


def test_large_fields_that_the_parser_does_not_know_are_left_out() -> None:
    """It would keep a copy of each. What is known stays, whatever its size, and so does what is not well-formed."""
    name = "n" * 100_000
    worker = p2p_pb2.WorkerMetadata(
        worker_rank=3, nixl_metadata=b"x" * 1_000_000, worker_grpc_endpoint=name, accelerator="a", agent_name="small"
    )
    worker.topology["zone"] = "z"
    data = worker.SerializeToString() * 2
    left = without_large_fields(data, record_pb2.WorkerFacts.DESCRIPTOR)
    assert len(left) < 2 * len(name) + 1000
    parsed, whole = record_pb2.WorkerFacts.FromString(left), record_pb2.WorkerFacts.FromString(data)
    for facts in (parsed, whole):
        facts.DiscardUnknownFields()
    assert parsed == whole
    assert parsed.worker_grpc_endpoint == name
    assert without_large_fields(left, record_pb2.WorkerFacts.DESCRIPTOR) == left
    for cut in (data[:-1], data + b"\x0f"):
        with pytest.raises(DecodeError):
            record_pb2.WorkerFacts.FromString(without_large_fields(cut, record_pb2.WorkerFacts.DESCRIPTOR))


class Slow:
    """A call whose request does not come."""

    def __init__(self, connection: str, request: bytes | None = None) -> None:
        self.connection, self.request = connection, request
        self.refused = threading.Event()

    def after_events(self, then: Callable[[], None]) -> None:
        self.then = then
        then()

    def refuse(self, status: grpc.StatusCode, reason: str) -> None:
        self.refused.set()


def test_a_connection_that_was_too_slow_has_one_place_until_a_request_came() -> None:
    receiving, free = Receiving(2, 0.0), threading.Event()
    slow = [Slow("slow"), Slow("slow")]
    for one in slow:
        assert receiving.reserve(free.set)
        receiving.begin(cast(ArrivingCall, one))
    assert not receiving.reserve(free.set)
    assert slow[0].refused.wait(60)
    assert slow[1].refused.wait(60)
    receiving.end(cast(ArrivingCall, slow[0]))
    assert free.wait(60)
    assert receiving.is_slow(cast(ArrivingCall, slow[0]))
    assert not receiving.may_take_slow(others_wait=False)
    receiving.end(cast(ArrivingCall, slow[1]))
    assert receiving.may_take_slow(others_wait=True)
    came = cast(ArrivingCall, Slow("slow", b"request"))
    assert receiving.reserve(free.set)
    receiving.begin(came)
    receiving.end(came)
    assert not receiving.is_slow(came)


def test_a_request_that_had_come_when_it_was_looked_at_is_not_refused() -> None:
    """Only we had not noticed: the thread that is told was late."""
    receiving, free, looked = Receiving(1, 0.0), threading.Event(), threading.Event()
    call = Slow("a", b"request")

    def told_late(then: Callable[[], None]) -> None:
        receiving.end(cast(ArrivingCall, call))
        then()
        looked.set()

    call.after_events = told_late  # type: ignore[method-assign]
    assert receiving.reserve(free.set)
    receiving.begin(cast(ArrivingCall, call))
    assert not receiving.reserve(free.set)
    assert looked.wait(60)
    assert free.wait(60)
    assert not call.refused.is_set()


def receives(receiving: Receiving, name: str) -> Slow:
    """A request that began to come a while ago."""
    call = Slow(name)
    assert receiving.reserve(lambda: None)
    receiving.begin(cast(ArrivingCall, call))
    return call


def test_of_requests_that_take_long_one_is_received_beside_no_publish() -> None:
    """Nothing says that they are large, before grpcio has three copies of each."""
    held = [0]
    publishes, others = Receiving(1, 60.0), [Receiving(2, 60.0), Receiving(3, 60.0)]
    large = LargeRequests(publishes, others, lambda: held[0])
    large.start()
    first = receives(others[0], "a")
    second = receives(others[1], "b")
    assert second.refused.wait(60)
    assert not first.refused.is_set()
    others[1].end(cast(ArrivingCall, second))

    published = receives(publishes, "c")
    assert first.refused.wait(60)
    others[0].end(cast(ArrivingCall, first))
    publishes.end(cast(ArrivingCall, published))
    assert not published.refused.is_set()

    held[0] = 8 * 1024 * 1024
    assert receives(others[0], "d").refused.wait(60)
    assert large.problem is None
    large.stop()

"""Hostile clients, each a process: `python -m tests.adversary.hostile NAME ADDRESS HTTP_PORT MODEL TOKEN`.

Says "going" on stdout once it is at it, goes on until its stdin ends, then prints its outcomes as a line of JSON.
MODEL is one that the server may read. TOKEN is one of a worker (role publish), and "" for a stranger.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import socket
import struct
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import grpc

from mxserver.wire.calls import source_id
from mxserver.wire.proto import cache_pb2, health_pb2, load_pb2, model_pb2, mx_pb2, p2p_pb2

P2P = "/model_express.p2p.P2pService/"
FLEET = "/model_express.mx.FleetService/"
CACHE = "/model_express.mx.CacheService/"
MODELS = "/model_express.model.ModelService/"
GET_HEALTH = "/model_express.health.HealthService/GetHealth"
CHECK = "/grpc.health.v1.Health/Check"
WATCH = "/grpc.health.v1.Health/Watch"
UNARY = (
    f"{P2P}UpdateStatus",
    f"{P2P}ListSources",
    f"{P2P}PublishMetadata",
    f"{FLEET}TakeStorageTurn",
    GET_HEALTH,
    CHECK,
)
MIB = 1024 * 1024
FILE = model_pb2.FILE
EDGES = (1, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53 + 1, 2**63 - 1, 2**63, 2**64 - 1)
THREADS = 4


class Hostile:
    """One client with some connections; what its calls came to is counted in `outcomes`."""

    def __init__(self, address: str, http_port: int, model: str, token: str) -> None:
        self.address, self.http_port, self.model = address, http_port, model
        host, _, port = address.rpartition(":")
        self.place = host, int(port)
        self.metadata = (("authorization", f"Bearer {token}"),) if token else ()
        self.ending = threading.Event()
        self.outcomes: Counter[str] = Counter()
        self.going = threading.Event()

    def channel(self) -> grpc.Channel:
        """A connection of its own."""
        unlimited = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
        more = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_metadata_size", 64 * MIB)]
        return grpc.insecure_channel(self.address, options=[*unlimited, *more])

    def unary(self, channel: grpc.Channel, method: str, request: Any, metadata: Any = None, seconds: float = 20) -> str:
        """The status with which a call ends."""
        body = request if isinstance(request, bytes) else request.SerializeToString()
        try:
            channel.unary_unary(method)(body, timeout=seconds, metadata=self.metadata if metadata is None else metadata)
        except grpc.RpcError as error:
            return self.count(method, error.code().name)  # type: ignore[attr-defined]
        return self.count(method, "OK")

    def count(self, method: str, outcome: str) -> str:
        self.outcomes[f"{method.rpartition('/')[2]} {outcome}"] += 1
        self.going.set()
        return outcome

    def in_threads(self, work: Callable[[grpc.Channel], None], count: int = THREADS) -> None:
        """Repeats `work` until the end, in threads with a connection each."""

        def repeat() -> None:
            with self.channel() as channel:
                while not self.ending.is_set():
                    work(channel)

        threads = [threading.Thread(target=repeat, daemon=True) for _ in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def until_end(self) -> None:
        self.going.set()
        self.ending.wait()


def never_reads(hostile: Hostile) -> None:
    """Streams that nobody reads, and answers for which the connection has no room (HTTP/2 window 0)."""
    with hostile.channel() as channel:
        asked = [
            (f"{MODELS}StreamModelFiles", model_pb2.ModelFilesRequest(model_name=hostile.model, provider=FILE)),
            (f"{CACHE}ValidateModel", cache_pb2.ValidateModelRequest(model_name=hostile.model, provider=FILE)),
            (WATCH, b""),
        ]
        calls = [
            channel.unary_stream(method)(
                request if isinstance(request, bytes) else request.SerializeToString(), metadata=hostile.metadata
            )
            for method, request in asked
            for _ in range(100)
        ]
        held = [Closed(hostile.place, hostile.metadata) for _ in range(8)]
        for one in held:
            one.ask(f"{P2P}ListSources", b"", 1000)
        hostile.until_end()
        for call in calls:
            call.cancel()
        for one in held:
            one.close()


class Closed:
    """A connection whose window for answers is 0, with calls whose answers are not taken."""

    def __init__(self, place: tuple[str, int], metadata: tuple[tuple[str, str], ...]) -> None:
        self._metadata = metadata
        self._streams = itertools.count(1, 2)
        self._socket = socket.create_connection(place)
        self._socket.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + _frame(4, 0, 0, struct.pack(">HI", 4, 0)))
        self._socket.sendall(_frame(4, 1, 0))

    def ask(self, method: str, request: bytes, calls: int) -> bool:
        """False if the server has closed the connection."""
        fields = [(":method", "POST"), (":scheme", "http"), (":path", method), (":authority", "x")]
        fields += [("te", "trailers"), ("content-type", "application/grpc"), *self._metadata]
        block = b"".join(b"\x00" + _literal(name) + _literal(value) for name, value in fields)
        message = bytes(1) + struct.pack(">I", len(request)) + request
        try:
            for stream in itertools.islice(self._streams, calls):
                self._socket.sendall(_frame(1, 4, stream, block) + _frame(0, 1, stream, message))
        except OSError:
            return False
        return True

    def close(self) -> None:
        self._socket.close()


def _frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """RFC 9113, 4.1."""
    return struct.pack(">I", len(payload))[1:] + bytes((kind, flags)) + struct.pack(">I", stream) + payload


def _literal(text: str) -> bytes:
    """RFC 7541, 5.2, without Huffman; shorter than 127 bytes."""
    return bytes((len(text),)) + text.encode()


def never_reads_records(hostile: Hostile) -> None:
    """Asks again and again for a record of 95 MiB and for listings, and takes none of it."""
    identity = p2p_pb2.SourceIdentity(model_name="large")
    with hostile.channel() as channel:
        hostile.unary(
            channel,
            f"{P2P}PublishMetadata",
            p2p_pb2.PublishMetadataRequest(
                identity=identity, worker_id="large", worker=p2p_pb2.WorkerMetadata(nixl_metadata=bytes(95 * MIB))
            ),
            seconds=60,
        )
    request = p2p_pb2.GetMetadataRequest(mx_source_id=source_id(identity), worker_id="large").SerializeToString()
    held: list[Closed] = []
    while not hostile.ending.is_set():
        held = [
            one for one in held if one.ask(f"{P2P}GetMetadata", request, 4) and one.ask(f"{P2P}ListSources", b"", 4)
        ]
        while len(held) < 16:
            held.append(Closed(hostile.place, hostile.metadata))
        hostile.ending.wait(0.5)
    for one in held:
        one.close()


def never_ends(hostile: Hostile) -> None:
    """Calls whose request never comes, 200 for each method."""
    with hostile.channel() as channel:

        def nothing() -> Iterator[bytes]:
            hostile.ending.wait()
            yield from ()

        calls = [
            channel.stream_unary(method).future(nothing(), metadata=hostile.metadata)
            for method in UNARY
            for _ in range(60)
        ]
        hostile.until_end()
        for call in calls:
            call.cancel()


def sends_100_mib(hostile: Hostile) -> None:
    """Messages of up to 100 MiB: one blob, and empty parts that become large when they are parsed."""
    blob = p2p_pb2.PublishMetadataRequest(
        identity=p2p_pb2.SourceIdentity(model_name="large"),
        worker_id="large",
        worker=p2p_pb2.WorkerMetadata(nixl_metadata=bytes(95 * MIB)),
    ).SerializeToString()
    parts = {mib: _field(2, b"\x1a\x00" * (mib * MIB // 2)) for mib in (3, 12)}

    def send(channel: grpc.Channel) -> None:
        for method, body in (
            (f"{P2P}PublishMetadata", blob),
            (f"{P2P}PublishMetadata", parts[12]),
            (f"{P2P}UpdateStatus", blob),
            (f"{P2P}PublishMetadata", parts[3]),
            (f"{P2P}ListSources", blob),
        ):
            hostile.unary(channel, method, body)

    hostile.in_threads(send)


def _field(number: int, payload: bytes) -> bytes:
    """A length-delimited field of protobuf's encoding."""
    length, size = bytearray(), len(payload)
    while size > 0x7F:
        length.append(size & 0x7F | 0x80)
        size >>= 7
    return bytes((number << 3 | 2, *length, size)) + payload


def integer_edges(hostile: Hostile) -> None:
    """Every integer of our requests at the edges of its type, and beyond it on the wire."""
    channel = hostile.channel()
    source = "0123456789abcdef"

    def send(channel: grpc.Channel) -> None:
        edge = random.choice(EDGES)
        narrow, status = edge % 2**32, random.choice((0, 1, 2, 3, 4, 2**31 - 1, -(2**31)))
        worker = p2p_pb2.WorkerMetadata(worker_rank=narrow, status=status)
        identity = p2p_pb2.SourceIdentity(model_name="edges", tensor_parallel_size=narrow)
        progress = load_pb2.LoadProgress()
        for method, request in (
            (
                f"{P2P}PublishMetadata",
                p2p_pb2.PublishMetadataRequest(identity=identity, worker=worker, worker_id=f"e{edge % 7}", epoch=edge),
            ),
            (
                f"{P2P}UpdateStatus",
                p2p_pb2.UpdateStatusRequest(
                    mx_source_id=source,
                    worker_id="e1",
                    worker_rank=narrow,
                    status=status,
                    epoch=edge,
                    source_load=random.choice((float("nan"), float("inf"), -1e308)),
                    load_progress=progress,
                ),
            ),
            (
                f"{P2P}ListSources",
                p2p_pb2.ListSourcesRequest(
                    status_filter=status,
                    worker_rank_filter=narrow,
                    limit=narrow,
                    min_updated_at=edge,
                    min_training_step=random.choice((0, edge)),
                ),
            ),
            (
                f"{FLEET}TakeStorageTurn",
                mx_pb2.TakeStorageTurnRequest(mx_source_id=source, worker_rank=narrow, worker_id="e", epoch=edge),
            ),
            (
                f"{FLEET}EndStorageTurn",
                mx_pb2.EndStorageTurnRequest(mx_source_id=source, worker_rank=narrow, worker_id="e", epoch=edge),
            ),
            (
                f"{MODELS}ListModelFiles",
                model_pb2.ModelFilesRequest(model_name="x/y", provider=status, chunk_size=narrow),
            ),
            (f"{P2P}UpdateStatus", b"\x10" + b"\xff" * 10),  # a varint of more than 64 bits
        ):
            hostile.unary(channel, method, request)

    channel.close()
    hostile.in_threads(send)


def opens_300_connections(hostile: Hostile) -> None:
    """300 silent connections to each port, opened again when they are closed."""
    held: list[socket.socket] = []
    ports = [hostile.place[1], hostile.http_port]
    while not hostile.ending.is_set():
        held = [one for one in held if _is_open(one)]
        for port in ports:
            count = sum(one.getpeername()[1] == port for one in held)
            for _ in range(300 - count):
                with contextlib.suppress(OSError):
                    held.append(socket.create_connection((hostile.place[0], port), timeout=1))
        hostile.going.set()
        hostile.ending.wait(0.3)


def _is_open(connection: socket.socket) -> bool:
    connection.setblocking(False)
    try:
        connection.getpeername()
        if connection.recv(4096):
            return True
    except BlockingIOError:
        return True
    except OSError:
        pass
    connection.close()
    return False


def drips_headers(hostile: Hostile) -> None:
    """300 connections to each port whose headers come byte by byte."""
    heads = {
        hostile.http_port: b"GET /readyz HTTP/1.1\r\nHost: x\r\n" + b"X-A: b\r\n" * 1000,
        hostile.place[1]: b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + _frame(4, 0, 0) + _frame(1, 0, 1, b"\x00") * 100,
    }
    open_ones: list[tuple[socket.socket, int, int]] = []
    while not hostile.ending.is_set():
        for port in heads:
            while sum(one[1] == port for one in open_ones) < 300:
                try:
                    open_ones.append((socket.create_connection((hostile.place[0], port), timeout=1), port, 0))
                except OSError:
                    break
        hostile.going.set()
        going_on = []
        for connection, port, sent in open_ones:
            try:
                connection.sendall(heads[port][sent : sent + 1])
                going_on.append((connection, port, sent + 1))
            except OSError:
                connection.close()
        open_ones = going_on
        hostile.ending.wait(0.2)


def watches_and_leaves(hostile: Hostile) -> None:
    """Health watches that begin and end, and calls that are cancelled as soon as they are made."""

    def come_and_leave(channel: grpc.Channel) -> None:
        watches = [channel.unary_stream(WATCH)(b"") for _ in range(20)]
        calls = [
            channel.unary_unary(method).future(b"", metadata=hostile.metadata) for method in UNARY for _ in range(5)
        ]
        for call in (*watches, *calls):
            call.cancel()
        hostile.going.set()
        hostile.ending.wait(0.01)

    hostile.in_threads(come_and_leave)


def asks_and_leaves(hostile: Hostile) -> None:
    """Models that are asked for, each another one, by callers who do not wait for them."""
    number = 0

    def ask(channel: grpc.Channel) -> None:
        nonlocal number
        calls = []
        for _ in range(20):
            number += 1
            request = model_pb2.ModelDownloadRequest(model_name=f"nobody/model-{number}", provider=0)
            calls.append(
                channel.unary_stream(f"{MODELS}EnsureModelDownloaded")(
                    request.SerializeToString(), metadata=hostile.metadata
                )
            )
        hostile.going.set()
        hostile.ending.wait(0.05)
        for call in calls:
            call.cancel()

    hostile.in_threads(ask)


def pins_without_right(hostile: Hostile) -> None:
    """Pins, removals and validations by a caller who may only publish."""

    def pin(channel: grpc.Channel) -> None:
        named = {"model_name": hostile.model, "provider": FILE}
        ensure = channel.unary_stream(f"{MODELS}EnsureModelDownloaded")(
            model_pb2.ModelDownloadRequest(**named, pin=True).SerializeToString(), metadata=hostile.metadata
        )
        with contextlib.suppress(grpc.RpcError):
            for _ in ensure:
                pass
        hostile.count("EnsureModelDownloaded", ensure.code().name)
        hostile.unary(channel, f"{CACHE}PinModel", cache_pb2.PinModelRequest(**named))
        hostile.unary(channel, f"{MODELS}DeleteModel", model_pb2.DeleteModelRequest(model_name=hostile.model))

    hostile.in_threads(pin)


def names_of_8_mib(hostile: Hostile) -> None:
    """Every name of our requests with 8 MiB."""
    name = "n" * (8 * MIB)

    def send(channel: grpc.Channel) -> None:
        for method, request in (
            (f"{P2P}PublishMetadata", _publication(name, "w")),
            (f"{P2P}PublishMetadata", _publication("m", name)),
            (f"{P2P}UpdateStatus", p2p_pb2.UpdateStatusRequest(mx_source_id=name, worker_id=name, status=2)),
            (f"{P2P}ListSources", p2p_pb2.ListSourcesRequest(model_name_filter=name)),
            (f"{P2P}GetMetadata", p2p_pb2.GetMetadataRequest(mx_source_id=name, worker_id=name)),
            (f"{FLEET}TakeStorageTurn", mx_pb2.TakeStorageTurnRequest(mx_source_id=name, worker_id=name)),
            (f"{MODELS}ListModelFiles", model_pb2.ModelFilesRequest(model_name=name)),
            (f"{MODELS}DeleteModel", model_pb2.DeleteModelRequest(model_name=name)),
            (CHECK, _field(1, name.encode())),
            (GET_HEALTH, health_pb2.HealthRequest().SerializeToString() + _field(9, name.encode())),
        ):
            hostile.unary(channel, method, request)

    hostile.in_threads(send, 2)


def _publication(model: str, worker: str) -> p2p_pb2.PublishMetadataRequest:
    return p2p_pb2.PublishMetadataRequest(
        identity=p2p_pb2.SourceIdentity(model_name=model), worker=p2p_pb2.WorkerMetadata(), worker_id=worker
    )


def floods_tokens(hostile: Hostile) -> None:
    """Tokens that are none, each another one: random ones, and ones that look like Kubernetes'."""

    def call(channel: grpc.Channel) -> None:
        junk = os.urandom(32).hex()
        token = random.choice((junk, f"eyJhbGciOiJSUzI1NiJ9.{junk}.{junk}"))
        calls = [
            channel.unary_unary(f"{P2P}ListSources").future(
                b"", metadata=(("authorization", f"Bearer {token}{n}"),), timeout=20
            )
            for n in range(25)
        ]
        for one in calls:
            hostile.outcomes[f"ListSources {one.code().name}"] += 1
        hostile.going.set()

    hostile.in_threads(call)


def floods_calls(hostile: Hostile) -> None:
    """Listings, publishes and heartbeats of an own record without pause."""

    def call(channel: grpc.Channel) -> None:
        hostile.unary(channel, f"{P2P}PublishMetadata", _publication("flood", f"w{random.randrange(8)}"))
        for _ in range(10):
            hostile.unary(channel, f"{P2P}ListSources", p2p_pb2.ListSourcesRequest())

    hostile.in_threads(call)


HOSTILE = {
    one.__name__: one
    for one in (
        never_reads,
        never_reads_records,
        never_ends,
        sends_100_mib,
        integer_edges,
        opens_300_connections,
        drips_headers,
        watches_and_leaves,
        asks_and_leaves,
        pins_without_right,
        names_of_8_mib,
        floods_tokens,
        floods_calls,
    )
}


def main(name: str, address: str, http_port: str, model: str, token: str) -> None:
    os.nice(5)
    hostile = Hostile(address, int(http_port), model, token)
    thread = threading.Thread(target=HOSTILE[name], args=(hostile,), daemon=True)
    thread.start()
    hostile.going.wait(60)
    print("going", flush=True)  # noqa: T201
    sys.stdin.read()
    hostile.ending.set()
    thread.join(5)
    print(json.dumps(hostile.outcomes), flush=True)  # noqa: T201
    os._exit(0)  # calls that never end have threads that never do


if __name__ == "__main__":
    main(*sys.argv[1:])

"""The port from which a holder sends chunks: who may fetch there, until when, and what a receiver does without it."""

from __future__ import annotations

import logging
import socket
import struct
import threading
import time
from collections.abc import Iterator
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest

from mxbench.fleet.free_ports import free_port
from mxcore.errors import LeaseEnded, NoChunkPort, PeerLost, TransferStalled
from mxcore.nixl.agent import live_agents
from mxcore.transfer.layout import ChunkRequest, all_chunks, build_layout
from mxcore.transfer.move import GREETING, TOKEN_BYTES, AgentSession, Source, SourceClient, TcpMover, show_token
from mxcore.transfer.move import tcp as socket_pull
from mxcore.transfer.move.tcp import connections_of
from mxcore.transfer.serve import ChunkListener, Holder, chunk_listener
from mxcore.transfer.serve.holder import MOST_CONNECTIONS, Lease
from mxserver.wire.proto import mx_pb2
from tests.transfer.conftest import StartWorker, wait_for
from tests.transfer.memory import HostTensors, model_specs
from tests.transfer.test_exchange import CHUNK_BYTES, SEED, Target

SECONDS = 60.0


@pytest.mark.parametrize(("cores", "connections"), [(1, 1), (2, 1), (3, 1), (4, 2), (64, 4)])
def test_how_many_connections(cores: int, connections: int) -> None:
    assert connections_of(cores) == connections


@pytest.mark.parametrize(("cores", "connections"), [(1, 1), (2, 2), (64, 8)])
def test_how_many_connections_by_tls(cores: int, connections: int) -> None:
    assert connections_of(cores, by_tls=True) == connections


@pytest.fixture
def holder() -> Iterator[Holder]:
    weights = HostTensors(model_specs(), SEED)
    layout, placement = build_layout("raw", weights.local_tensors())
    make = partial(AgentSession, "holder", tls="tcp,self", progress_thread=False)
    made = Holder(layout, placement, make, keep_alive=weights, chunk_bytes=CHUNK_BYTES, most_readers=1)
    yield made
    made.close()


@pytest.fixture
def listener(holder: Holder) -> Iterator[ChunkListener]:
    made = ChunkListener(holder, "127.0.0.1", 0)
    yield made
    made.close()


def exactly(connection: socket.socket, count: int) -> bytes:
    """So many bytes; MSG_WAITALL waits for nothing on a socket with a time-out."""
    received = b""
    while len(received) < count:
        more = connection.recv(count - len(received))
        assert more, received
        received += more
    return received


def allowed(holder: Holder) -> tuple[Lease, bytes]:
    """A lease that was granted all chunks, and its token."""
    lease, count = holder.grant(), len(holder.chunks)
    token = holder.open_sending(lease.lease_id)
    assert len(holder.ask(lease.lease_id, ChunkRequest(all_chunks(count), 0, count), 0).granted) == count
    return lease, token


def calling(listener: ChunkListener) -> socket.socket:
    return socket.create_connection(("127.0.0.1", listener.port), SECONDS)


def test_a_token_opens_it_and_the_end_of_its_lease_closes_it(holder: Holder, listener: ChunkListener) -> None:
    lease, token = allowed(holder)
    assert holder.open_sending(lease.lease_id) == token  # as often as it is asked for
    with calling(listener) as connection:
        show_token(connection, token, SECONDS)
        connection.sendall(struct.pack("<I", 0))
        assert exactly(connection, 8) == struct.pack("<II", 0, 0)
        exactly(connection, CHUNK_BYTES)
        holder.release(lease.lease_id)
        assert connection.recv(1) == b""
    with calling(listener) as late, pytest.raises(OSError, match="it closes the connection"):
        show_token(late, token, SECONDS)
    with pytest.raises(LeaseEnded):
        holder.open_sending(lease.lease_id)


@pytest.mark.parametrize("said", [b"GET / HTTP/1.1\r\n\r\n123456", GREETING + bytes(TOKEN_BYTES), GREETING + b"x"])
def test_strangers_are_told_nothing(holder: Holder, listener: ChunkListener, said: bytes) -> None:
    """Neither whoever speaks something else, nor whoever shows no lease's token; one that opened nothing has none."""
    holder.grant()
    with calling(listener) as connection:
        connection.sendall(said)
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(100) == b""


def test_silent_strangers_make_room_for_readers_and_end_with_the_port(
    holder: Holder, listener: ChunkListener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunk_listener, "_GREETING_SECONDS", SECONDS)
    silent = [calling(listener) for _ in range(16)]  # as many as there is room for, with one reader
    wait_for(lambda: len(listener._greeting) == len(silent))
    with calling(listener) as reader:
        show_token(reader, holder.open_sending(holder.grant().lease_id), SECONDS)
    wait_for(lambda: len(listener._greeting) == len(silent) - 1)  # one had to go
    listener.close()
    for connection in silent:
        assert connection.recv(1) == b""
        connection.close()
    listener.close()


def test_a_stranger_that_says_little_at_a_time_is_cut_off_all_the_same(
    listener: ChunkListener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunk_listener, "_GREETING_SECONDS", 0.2)
    with calling(listener) as connection:

        def cut_off() -> bool:
            try:
                connection.sendall(GREETING[:1])
                connection.setblocking(False)
                return connection.recv(1) == b""
            except BlockingIOError:
                return False
            except OSError:  # reset, for it says more
                return True

        wait_for(cut_off)


def test_a_reader_has_so_many_connections_and_no_more(
    holder: Holder, listener: ChunkListener, caplog: pytest.LogCaptureFixture
) -> None:
    token = holder.open_sending(holder.grant().lease_id)
    connections = [calling(listener) for _ in range(MOST_CONNECTIONS)]
    for connection in connections:
        show_token(connection, token, SECONDS)
    with calling(listener) as late, pytest.raises(OSError, match="it closes the connection"):
        show_token(late, token, SECONDS)
    more = [calling(listener) for _ in range(8)]
    wait_for(lambda: len(listener._greeting) == len(more))
    listener._greeting.clear()  # as if all of them were readers
    with caplog.at_level(logging.WARNING), calling(listener) as refused:
        assert refused.recv(1) == b""
    assert "there are too many" in caplog.text
    for connection in (*connections, *more):
        connection.close()


def test_a_holder_that_closes_waits_for_who_is_sent_to(holder: Holder, listener: ChunkListener) -> None:
    _, token = allowed(holder)
    with calling(listener) as connection:
        show_token(connection, token, SECONDS)
        connection.sendall(struct.pack(f"<{len(holder.chunks)}I", *range(len(holder.chunks))))  # takes nothing of it
        assert holder._sending == 1
        holder.close()
        assert holder._sending == 0


def test_a_receiver_that_is_lost_in_the_midst_of_a_chunk_loses_its_lease(
    holder: Holder, listener: ChunkListener
) -> None:
    lease, token = allowed(holder)
    connection = calling(listener)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # reset, as the kernel does
    show_token(connection, token, SECONDS)
    connection.sendall(struct.pack(f"<{len(holder.chunks)}I", *range(len(holder.chunks))))
    exactly(connection, 8)
    connection.close()
    wait_for(lambda: holder.live_leases == 0)
    assert lease.ended


def test_a_port_in_use_becomes_a_free_one(holder: Holder, listener: ChunkListener) -> None:
    other = ChunkListener(holder, "127.0.0.1", listener.port)
    assert other.port not in (0, listener.port)
    other.close()
    beyond = ChunkListener(holder, "", 65536 + 5)  # of a high rank
    assert beyond.port
    beyond.close()


class Pretender:
    """A port that takes connections and says something, or nothing."""

    def __init__(self, says: bytes | None) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._says = says
        self.accepted: list[socket.socket] = []

    def answer(self) -> None:
        connection, _ = self._listener.accept()
        self.accepted.append(connection)
        if self._says is not None:
            connection.sendall(self._says)

    def close(self) -> None:
        for each in (self._listener, *self.accepted):
            each.close()


def pull_from(port: int, holder: Holder, stall_seconds: float) -> TcpMover:
    client = SourceClient(Source("id", "there", 0, f"127.0.0.1:{port}"), timeout_seconds=1.0)
    with patch.object(socket_pull, "connections_of", lambda *_, **__: 1):
        return TcpMover(
            client,
            port,
            bytes(TOKEN_BYTES),
            holder.chunks,
            holder.addresses,
            hashed=True,
            stall_timeout_seconds=stall_seconds,
        )


@pytest.mark.parametrize(("says", "why"), [(b"HTTP/1.1", "it answers b'HTTP/1.1'"), (None, "timed out")])
def test_somebody_else_at_the_port(holder: Holder, says: bytes | None, why: str) -> None:
    there = Pretender(says)
    answering = threading.Thread(target=there.answer)
    answering.start()
    with pytest.raises(NoChunkPort, match=why):
        pull_from(there.port, holder, SECONDS)
    answering.join()
    there.close()
    with pytest.raises(NoChunkPort, match="no connection to"):
        pull_from(there.port, holder, SECONDS)


def test_bytes_are_news_and_silence_is_a_stall(holder: Holder) -> None:
    there = Pretender(GREETING)
    answering = threading.Thread(target=there.answer)
    answering.start()
    with pull_from(there.port, holder, 1.0) as mover:
        answering.join()
        assert list(mover.arrived()) == []  # nothing is asked for: that is no stall
        mover.ask([0, 1])
        assert not mover.idle
        there.accepted[0].sendall(struct.pack("<II", 0, 0) + b"x")
        wait_for(lambda: mover._reads.received_bytes == 1)
        began = time.monotonic()
        assert list(mover.arrived()) == []
        mover.wake()
        assert list(mover.arrived()) == []
        with pytest.raises(TransferStalled, match=r"worker there sent nothing of chunks \[0, 1\] for"):
            wait_for(lambda: list(mover.arrived()) != [])
        assert time.monotonic() - began >= 1.0
        mover.interrupt(PeerLost("given up on"))
        mover.interrupt(PeerLost("and again"))
        with pytest.raises(PeerLost, match="given up on"):
            list(mover.arrived())
    there.close()


def test_where_the_port_is_not_reached_the_holder_writes(
    start_worker: StartWorker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(client: SourceClient, port: int, token: bytes, tls: object) -> Any:
        raise NoChunkPort(f"worker {client.source.worker_id}: no connection to port {port}: a firewall")

    monkeypatch.setattr(socket_pull, "_connect", refused)
    target = Target("tcp")
    report = target.receive(start_worker("tcp", seed=SEED).serve())
    assert target.is_right()
    assert (report.operation, report.transport, report.failures) == ("write", "tcp", ())
    assert "a firewall" in caplog.text
    assert "it WRITEs instead" in caplog.text


@pytest.mark.parametrize("connections", [1, 3])
def test_no_agent_is_made_and_as_many_connections_as_cores_make_sense(
    start_worker: StartWorker, monkeypatch: pytest.MonkeyPatch, connections: int
) -> None:
    opened: list[int] = []

    class Noted(socket_pull.SocketReads):
        def __init__(self, connections: list[socket.socket], *, hashed: bool) -> None:
            super().__init__(connections, hashed=hashed)
            opened.append(len(connections))
            assert live_agents() == 0

    monkeypatch.setattr(socket_pull, "SocketReads", Noted)
    monkeypatch.setattr(socket_pull, "connections_of", lambda cores, *, by_tls: connections)
    target = Target("tcp")
    target.receive(start_worker("tcp", seed=SEED).serve())
    assert target.is_right()
    assert opened == [connections]


def test_a_holder_told_to_leave_it_to_nixl_has_no_port(start_worker: StartWorker) -> None:
    source = start_worker("tcp", environ={"MX_TCP_TRANSFER": "nixl"}, seed=SEED).serve()
    target = Target("tcp")
    assert target.receive(source).operation == "write"
    assert target.is_right()
    with SourceClient(source, timeout_seconds=SECONDS) as client:
        lease_id = client.prepare()
        with pytest.raises(Exception, match="this worker has no chunk port"):
            client.open_transfer(lease_id, target.layout.fingerprint, b"", (), mx_pb2.OPERATION_SEND)
        client.release(lease_id)


def test_a_fixed_port_counts_ranks(start_worker: StartWorker) -> None:
    port = free_port(following=1)
    worker = start_worker("tcp", environ={"MX_WORKER_CHUNK_PORT": str(port)}, rank=1, seed=SEED)
    source = worker.serve()
    with SourceClient(source, timeout_seconds=SECONDS) as client:
        assert client.get_layout("").transport.chunk_port == port + 1

"""Chunk connections by TLS: who gives and takes by it, who is refused, and what a middle box can do."""

from __future__ import annotations

import socket
import ssl
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from unittest.mock import patch

import pytest

from mxbench.fleet.fleet import BY_NIXL, settings_of
from mxbench.stand_ins.authority import Authority
from mxcore.errors import NoChunkPort, NotEncrypted, PeerLost, SourceUnreachable, TransferStalled
from mxcore.transfer.move import (
    GREETING,
    TOKEN_BYTES,
    ChunkTls,
    Source,
    SourceClient,
    TcpMover,
    chunk_server_context,
    cut_off,
    expect_token,
    tcp,
)
from mxcore.transfer.receive import holder_pull
from mxcore.transfer.serve import ChunkListener
from mxserver.wire.credentials import ClientCredentials, ServerTls, worker_tls
from tests.security.test_worker_tls import NAME, environ_of
from tests.transfer.conftest import WorkerProcess, wait_for
from tests.transfer.serve.test_chunk_port import allowed, calling, holder
from tests.transfer.serve.test_holder import Holder
from tests.transfer.test_exchange import SEED, Target

__all__ = ["holder"]  # a fixture

SECONDS = 60.0


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return environ_of(Authority(tmp_path_factory.mktemp("authority")))


@pytest.fixture
def fleet(files: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """This process has the fleet's certificates."""
    for name, value in files.items():
        monkeypatch.setenv(name, value)
    return files


HOLDERS = {
    "good": ("tcp", {}),
    "other": ("tcp", {}),
    "in clear": ("tcp", {"MX_CHUNK_TLS": "off"}),
    "nixl": (BY_NIXL, {}),
}


@pytest.fixture(scope="module")
def holders(files: dict[str, str]) -> Iterator[Callable[[str], Source]]:
    """Real workers by name, started when they are first asked for."""
    workers: dict[str, WorkerProcess] = {}
    sources: dict[str, Source] = {}

    def get(name: str) -> Source:
        if name not in workers:
            transport, more = HOLDERS[name]
            workers[name] = WorkerProcess({"seed": SEED}, {**settings_of(transport), **files, **more})
            sources[name] = workers[name].serve()
        return sources[name]

    yield get
    for worker in workers.values():
        worker.end()


class Box:
    """Stands between a receiver and a port: sees all bytes that the port sends, and changes them by `change`."""

    def __init__(self, port: int, change: Callable[[bytes], bytes] = lambda data: data) -> None:
        self._target, self._change = port, change
        self.seen = b""
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(("127.0.0.1", self._target))
                for pair in ((near, far, False), (far, near, True)):
                    self._threads.append(threading.Thread(target=self._forward, args=pair))
                    self._threads[-1].start()

    def _forward(self, source: socket.socket, sink: socket.socket, answers: bool) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                if answers:
                    data = self._change(data)
                    self.seen += data
                sink.sendall(data)
        cut_off(sink)
        cut_off(source)
        sink.close()

    def close(self) -> None:
        cut_off(self._listener)
        self._listener.close()
        for thread in self._threads:
            thread.join()


@pytest.fixture
def boxed(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, Callable[[bytes], bytes]], list[Box]]]:
    """Puts a box before the chunk port of one worker; returns the boxes that there are."""
    boxes: list[Box] = []
    real = tcp._connect

    def put(worker_id: str, change: Callable[[bytes], bytes]) -> list[Box]:
        def connect(client: SourceClient, port: int, token: bytes, tls: ChunkTls | None) -> socket.socket:
            if client.source.worker_id == worker_id:
                boxes.append(Box(port, change))
                port = boxes[-1].port
            return real(client, port, token, tls)

        monkeypatch.setattr(tcp, "_connect", connect)
        return boxes

    yield put
    for box in boxes:
        box.close()


def versions(monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """Of TLS, of all chunk connections that this process opens from now on; None is in clear."""
    found: list[str | None] = []
    real = tcp._connect

    def connect(client: SourceClient, port: int, token: bytes, tls: ChunkTls | None) -> socket.socket:
        connection = real(client, port, token, tls)
        found.append(connection.version() if isinstance(connection, ssl.SSLSocket) else None)
        return connection

    monkeypatch.setattr(tcp, "_connect", connect)
    return found


def test_nothing_of_the_weights_is_seen_on_the_way(
    fleet: dict[str, str],
    holders: Callable[[str], Source],
    boxed: Callable[[str, Callable[[bytes], bytes]], list[Box]],
) -> None:
    source = holders("good")
    boxes = boxed(source.worker_id, lambda data: data)
    target = Target("tcp")
    report = target.receive(source)
    assert target.is_right()
    assert (report.operation, report.in_clear) == ("send", False)
    seen = b"".join(box.seen for box in boxes)
    assert len(seen) > report.bytes
    weights = target.tensors.storages["layer3"].tobytes()
    assert not any(weights[at : at + 64] in seen for at in range(0, len(weights), 16384))
    assert GREETING not in seen


def test_one_switch_turns_it_off_for_both(
    fleet: dict[str, str],
    holders: Callable[[str], Source],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = versions(monkeypatch)
    off = holders("in clear")
    for target in (Target("tcp", MX_CHUNK_TLS="off"), Target("tcp")):
        if target.settings.chunk_tls == "off":
            target.receive(off)
            assert target.is_right()
            continue
        with pytest.raises(NotEncrypted, match=rf"worker {off.worker_id} sends weights in clear \(MX_CHUNK_TLS=off"):
            target.receive(off)
        assert not target.seen
    assert set(found) == {None}


def test_a_holder_that_encrypts_does_so_for_who_need_not_have_it(
    fleet: dict[str, str],
    holders: Callable[[str], Source],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = versions(monkeypatch)
    target = Target("tcp", MX_CHUNK_TLS="off")
    target.receive(holders("good"))
    assert target.is_right()
    assert set(found) == {"TLSv1.3"}


def test_who_has_another_holder_takes_from_that_one(
    fleet: dict[str, str],
    holders: Callable[[str], Source],
) -> None:
    clear = holders("in clear")
    good = holders("good")
    target = Target("tcp")
    report = target.receive(clear, good)
    assert target.is_right()
    assert set(report.bytes_from) == {good.worker_id}


def test_a_flipped_byte_ends_the_connection_and_lands_nowhere(
    fleet: dict[str, str],
    holders: Callable[[str], Source],
    boxed: Callable[[str, Callable[[bytes], bytes]], list[Box]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One in 200 KB, which is after the handshake; the other holder gives the rest."""
    passed = 0

    def flip(data: bytes) -> bytes:
        nonlocal passed
        before, passed = passed, passed + len(data)
        at = 200_000 - before
        return data if not 0 <= at < len(data) else data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]

    changed, source = holders("good"), holders("other")
    boxed(changed.worker_id, flip)
    monkeypatch.setattr("mxcore.transfer.move.tcp.connections_of", lambda cores, *, by_tls: 1)
    target = Target("tcp")
    report = target.receive(changed, find_more=lambda: [source] if passed > 200_000 else [])
    assert target.is_right()
    assert any("a TLS record was changed on its way" in failure for failure in report.failures)
    assert source.worker_id in report.bytes_from


def test_where_the_chunk_port_is_not_reached_nothing_is_asked_for_in_clear(
    fleet: dict[str, str],
    holders: Callable[[str], Source],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refused(client: SourceClient, port: int, token: bytes, tls: ChunkTls | None) -> socket.socket:
        raise NoChunkPort("a firewall")

    monkeypatch.setattr(tcp, "_connect", refused)
    with pytest.raises(SourceUnreachable, match=r"a firewall .*; by UCX it would WRITE in clear, which is not taken"):
        Target("tcp").receive(holders("good"))


def test_what_ucx_moves_in_clear_is_told_once(
    fleet: dict[str, str],
    holders: Callable[[str], Source],
    caplog: pytest.LogCaptureFixture,
) -> None:
    holder_pull._tell_in_clear.cache_clear()
    source = holders("nixl")
    for _ in range(2):
        target = Target(BY_NIXL)
        report = target.receive(source)
        assert target.is_right()
        assert (report.operation, report.in_clear) == ("write", True)
    assert caplog.text.count("weights come in clear, by UCX over tcp") == 1
    with pytest.raises(NotEncrypted, match=r"has no chunk port \(MX_TCP_TRANSFER there\)"):
        Target("tcp").receive(source)  # whose own setting is that of sockets


# One side of a connection at a time.


@pytest.fixture
def listener(fleet: dict[str, str], holder: Holder) -> Iterator[ChunkListener]:
    tls = worker_tls()
    assert tls is not None
    made = ChunkListener(holder, "127.0.0.1", 0, chunk_server_context(tls))
    yield made
    made.close()


def mover_of(
    port: int,
    holder: Holder,
    token: bytes = bytes(TOKEN_BYTES),
    tls: ChunkTls | None = None,
    stall_seconds: float = SECONDS,
) -> TcpMover:
    source = Source("id", "there", 0, f"127.0.0.1:{port}")
    one = patch.object(tcp, "connections_of", lambda *_, **__: 1)
    with SourceClient(source, timeout_seconds=10.0) as client, one:
        return TcpMover(
            client,
            port,
            token,
            holder.chunks,
            holder.addresses,
            hashed=True,
            stall_timeout_seconds=stall_seconds,
            tls=tls or ChunkTls.of(ClientCredentials.from_environ()),
        )


def token_of(holder: Holder) -> bytes:
    return allowed(holder)[1]


def sent_bytes(holder: Holder) -> int:
    return sum(lease.sender.sent_bytes for lease in holder._leases.values() if lease.sender is not None)


@pytest.mark.parametrize("shown", ["none", "a stranger's"])
def test_under_mtls_a_receiver_without_the_fleets_certificate_gets_nothing(
    listener: ChunkListener,
    holder: Holder,
    tmp_path: Path,
    shown: str,
) -> None:
    credentials = ClientCredentials.from_environ()
    cert, key = None, None
    if shown != "none":
        (tmp_path / "other").mkdir()
        cert, key = Authority(tmp_path / "other").issue("stranger", NAME)
    mine = ClientCredentials(credentials.ca_file, cert, key, credentials.peer_name)
    with pytest.raises((NotEncrypted, NoChunkPort)):  # the alert arrives, or the end of the connection before it
        mover_of(listener.port, holder, token_of(holder), ChunkTls.of(mine))
    assert sent_bytes(holder) == 0


def test_a_holder_with_a_strangers_certificate_is_refused_by_name(
    fleet: dict[str, str],
    holder: Holder,
    tmp_path: Path,
) -> None:
    (tmp_path / "other").mkdir()
    other = Authority(tmp_path / "other")
    made = ChunkListener(holder, "127.0.0.1", 0, chunk_server_context(ServerTls(*other.issue("stranger", NAME))))
    with pytest.raises(NotEncrypted, match=r"worker there at 127.0.0.1, port \d+: no TLS .* verify failed"):
        mover_of(made.port, holder, token_of(holder))
    made.close()


def test_a_holder_of_another_name_is_refused(
    listener: ChunkListener,
    holder: Holder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MX_TLS_PEER_NAME", "mx-other")
    with pytest.raises(NotEncrypted, match="verify failed"):
        mover_of(listener.port, holder, token_of(holder))


def test_who_speaks_in_clear_is_told_nothing(listener: ChunkListener, holder: Holder) -> None:
    with calling(listener) as connection:
        connection.sendall(GREETING + token_of(holder))
        with suppress(ConnectionResetError):
            answer = connection.recv(100)
            assert GREETING not in answer  # an alert at most
    assert sent_bytes(holder) == 0


def test_a_port_in_clear_is_not_taken_for_one_by_tls(fleet: dict[str, str], holder: Holder) -> None:
    clear = ChunkListener(holder, "127.0.0.1", 0)
    with pytest.raises((NotEncrypted, NoChunkPort)):
        mover_of(clear.port, holder, token_of(holder))
    clear.close()


def test_a_connection_ends_with_its_lease(listener: ChunkListener, holder: Holder) -> None:
    lease, token = allowed(holder)
    with mover_of(listener.port, holder, token) as mover:
        mover.ask([0])
        assert [each.chunk for each in arrivals(mover)] == [0]
        holder.release(lease.lease_id)
        mover.ask([1])
        with pytest.raises(PeerLost):
            arrivals(mover)


def arrivals(mover: TcpMover) -> list[object]:
    return wait_for(lambda: list(mover.arrived()))  # type: ignore[no-any-return]


def test_silence_is_a_stall_and_an_interrupt_ends_a_wait(fleet: dict[str, str], holder: Holder) -> None:
    tls = worker_tls()
    assert tls is not None
    context, ends = chunk_server_context(tls), []

    def answer(listener: socket.socket) -> None:
        there = context.wrap_socket(listener.accept()[0], server_side=True, do_handshake_on_connect=False)
        ends.append(there)
        expect_token(there, SECONDS)
        there.sendall(GREETING)
        there.sendall(struct.pack("<II", 0, 0) + b"x")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        answering = threading.Thread(target=answer, args=(listener,))
        answering.start()
        with mover_of(listener.getsockname()[1], holder, stall_seconds=1.0) as mover:
            answering.join()
            mover.ask([0, 1])
            wait_for(lambda: mover._reads.received_bytes == 1)
            assert list(mover.arrived()) == []
            with pytest.raises(TransferStalled, match=r"worker there sent nothing of chunks \[0, 1\] for"):
                wait_for(lambda: list(mover.arrived()) != [])
            mover.interrupt(PeerLost("given up on"))
            with pytest.raises(PeerLost, match="given up on"):
                list(mover.arrived())
    ends[0].close()


def test_what_is_cut_off_never_goes_on_in_clear(listener: ChunkListener, holder: Holder) -> None:
    """An SSLSocket's own `shutdown` forgets the keys: what is sent after it goes as it is."""
    with socket.create_connection(("127.0.0.1", listener.port)) as plain:
        tls = ChunkTls.of(ClientCredentials.from_environ())
        connection = tls.secured(plain, "127.0.0.1", SECONDS)
    cut_off(connection)
    assert connection.version() == "TLSv1.3"
    with pytest.raises(OSError):  # noqa: PT011 - of a kind, not of a text
        connection.sendall(b"weights")
    connection.close()

"""Chunks over TCP connections in compiled code: what arrives, what is said, and that nothing lands after the end."""

from __future__ import annotations

import errno
import gc
import socket
import ssl
import struct
import threading
import weakref
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mxbench.stand_ins.authority import Authority
from mxcore.digest import xxh3_64_segments
from mxcore.sockets import ChunkSender, SocketReads
from tests.transfer.conftest import wait_for

PIECE_BYTES = 256 << 10
PATIENT_SECONDS = 60.0


def q(*values: int) -> array[int]:
    return array("Q", values)


def connected() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        here = socket.create_connection(listener.getsockname())
        there, _ = listener.accept()
    return here, there


class Memory:
    """Stretches with gaps between them, in order, that make up chunks of some stretches each."""

    def __init__(self, chunks: Sequence[Sequence[int]], gap: int, seed: int | None) -> None:
        lengths = [length for chunk in chunks for length in chunk]
        self.bytes = np.full(sum(lengths) + gap * (len(lengths) + 1), 0xEE, np.uint8)
        self.places: list[int] = []
        base, place = int(self.bytes.ctypes.data), gap
        for length in lengths:
            if seed is not None:
                self.bytes[place : place + length] = np.random.default_rng(seed + place).integers(0, 256, length)
            self.places.append(base + place)
            place += length + gap
        self.lengths = lengths
        self.starts = [0]
        for chunk in chunks:
            self.starts.append(self.starts[-1] + len(chunk))

    def of(self, chunk: int) -> tuple[array[int], array[int]]:
        part = slice(self.starts[chunk], self.starts[chunk + 1])
        return q(*self.places[part]), q(*self.lengths[part])

    def sender(self, allowed: Sequence[int] | None = None) -> ChunkSender:
        sender = ChunkSender(q(*self.places), q(*self.lengths), q(*self.starts))
        sender.allow(range(len(self.starts) - 1) if allowed is None else allowed)
        return sender


class Serving:
    """A sender on a thread of its own, at the other end of `socket`."""

    def __init__(self, sender: ChunkSender) -> None:
        self.socket, self.there = connected()
        self.result: list[int] = []
        self._thread = threading.Thread(target=self._run, args=(sender,))
        self._thread.start()

    def _run(self, sender: ChunkSender) -> None:
        self.result.append(sender.serve(self.there))

    def end(self) -> int:
        """Closes this end; what the other one's `serve` returned."""
        with suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()
        self._thread.join()
        self.there.close()
        return self.result[0]


@pytest.fixture
def serve() -> Iterator[Callable[[ChunkSender], Serving]]:
    started: list[Serving] = []

    def start(sender: ChunkSender) -> Serving:
        started.append(Serving(sender))
        return started[-1]

    yield start
    for serving in started:
        serving.end()


def all_of(reads: SocketReads, count: int) -> dict[int, tuple[int, bytes]]:
    found: dict[int, tuple[int, bytes]] = {}
    while len(found) < count:
        ended = reads.ended(PATIENT_SECONDS)
        assert ended
        found.update((chunk, (error, digest)) for chunk, error, digest in ended)
    return found


@pytest.mark.parametrize("connections", [1, 3])
@pytest.mark.parametrize("gap", [0, 64])
def test_chunks_arrive_scattered_with_their_digests(
    serve: Callable[[ChunkSender], Serving], gap: int, connections: int
) -> None:
    chunks = [[1], [0, 5, 0], [PIECE_BYTES], [PIECE_BYTES + 1, 17], [7] * 2000, [3 * PIECE_BYTES, PIECE_BYTES // 3]] * 3
    source, target = Memory(chunks, gap, 1), Memory(chunks, gap, None)
    sender = source.sender()
    served = [serve(sender) for _ in range(connections)]
    reads = SocketReads([each.socket for each in served], hashed=True)
    for chunk in range(len(chunks)):
        reads.ask(chunk, *target.of(chunk))
    found = all_of(reads, len(chunks))
    assert reads.ended(PATIENT_SECONDS) == []  # nothing is asked for any more: it does not wait
    assert reads.received_bytes == sum(map(sum, chunks))
    reads.close()
    assert (source.bytes == target.bytes).all()  # between the stretches as well: nothing was written there
    for chunk in range(len(chunks)):
        assert found[chunk] == (0, xxh3_64_segments(*source.of(chunk)).to_bytes(8, "little"))
    assert [each.end() for each in served] == [0] * connections
    assert sender.sent_bytes == sum(map(sum, chunks))


@given(
    st.lists(st.lists(st.integers(0, 3 * PIECE_BYTES), min_size=1, max_size=5).filter(sum), min_size=1, max_size=6),
    st.integers(0, 3),
    st.randoms(use_true_random=False),
)
def test_any_cut_into_chunks(chunks: list[list[int]], gap: int, chance: Random) -> None:
    order = list(range(len(chunks)))
    chance.shuffle(order)
    source, target = Memory(chunks, gap, 1), Memory(chunks, gap, None)
    served = Serving(source.sender())
    reads = SocketReads([served.socket], hashed=False)
    for chunk in order:
        reads.ask(chunk, *target.of(chunk))
    assert all_of(reads, len(chunks)) == dict.fromkeys(order, (0, b""))
    reads.close()
    assert (source.bytes == target.bytes).all()
    assert served.end() == 0


def test_a_chunk_is_sent_once_for_each_time_it_is_allowed(serve: Callable[[ChunkSender], Serving]) -> None:
    source, target = Memory([[100], [200]], 0, 1), Memory([[100], [200]], 0, None)
    sender = source.sender(allowed=[0])
    reads = SocketReads([serve(sender).socket], hashed=True)
    reads.ask(0, *target.of(0))
    assert all_of(reads, 1)[0][0] == 0
    sender.allow([0, 1])
    for chunk in range(2):
        reads.ask(chunk, *target.of(chunk))
    assert {error for error, _ in all_of(reads, 2).values()} == {0}
    sender.allow([0])
    sender.forbid_all()
    reads.ask(1, *target.of(1))
    reads.ask(0, *target.of(0))  # after an error the connection is of no use, and says so
    assert {chunk: error for chunk, (error, _) in all_of(reads, 2).items()} == {1: errno.ENODATA, 0: errno.ENODATA}
    reads.ask(0, *target.of(0))
    assert all_of(reads, 1)[0] == (errno.ENODATA, b"")
    reads.close()


@pytest.mark.parametrize("request_bytes", [b"\xff\xff\xff\xff", b"\x02\x00\x00\x00", b"\x00\x00\x00\x01"])
def test_a_number_beyond_the_chunks_is_not_here(serve: Callable[[ChunkSender], Serving], request_bytes: bytes) -> None:
    peer = serve(Memory([[10], [10]], 0, 1).sender()).socket
    peer.sendall(request_bytes)
    assert peer.recv(100) == request_bytes + struct.pack("<I", 1)


def test_half_a_request_and_none(serve: Callable[[ChunkSender], Serving]) -> None:
    sender = Memory([[10]], 0, 1).sender()
    silent, broken = serve(sender), serve(sender)
    broken.socket.sendall(b"\x00\x00")
    assert (silent.end(), broken.end()) == (0, 0)


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (b"", errno.ECONNRESET),
        (struct.pack("<II", 6, 0), errno.EPROTO),
        (struct.pack("<II", 5, 1), errno.ENODATA),
        (struct.pack("<II", 5, 7), errno.ENODATA),
        (struct.pack("<II", 5, 0) + b"abc", errno.ECONNRESET),
        (b"\x05\x00", errno.ECONNRESET),
    ],
)
def test_wrong_answers(answer: bytes, error: int) -> None:
    here, there = connected()
    target = Memory([[10]], 0, None)
    reads = SocketReads([here], hashed=True)
    reads.ask(5, *target.of(0))
    assert there.recv(100) == b"\x05\x00\x00\x00"
    there.sendall(answer)
    there.close()
    assert all_of(reads, 1)[5] == (error, b"")
    reads.close()
    here.close()


def test_nothing_lands_after_the_end_and_waiting_ends_with_it() -> None:
    here, there = connected()
    target = Memory([[3 * PIECE_BYTES]], 0, None)
    reads = SocketReads([here], hashed=True)
    reads.ask(0, *target.of(0))
    there.sendall(struct.pack("<II", 0, 0) + b"\x01" * PIECE_BYTES)
    wait_for(lambda: reads.received_bytes == PIECE_BYTES)  # less than what the kernel was told to wake for
    waited: list[object] = []
    waiting = threading.Thread(target=lambda: waited.append(reads.ended(PATIENT_SECONDS)))
    waiting.start()
    reads.close()
    waiting.join()
    assert waited == [[]]
    before = target.bytes.copy()
    with suppress(OSError):
        there.sendall(b"\x02" * PIECE_BYTES)
    assert (target.bytes == before).all()
    assert reads.ended(PATIENT_SECONDS) == []
    reads.wake()
    reads.close()
    with pytest.raises(ValueError, match="closed"):
        reads.ask(0, *target.of(0))
    here.close()
    there.close()


def test_waking_ends_a_wait() -> None:
    here, there = connected()
    target = Memory([[10]], 0, None)
    reads = SocketReads([here], hashed=True)
    reads.ask(0, *target.of(0))
    reads.wake()
    assert reads.ended(PATIENT_SECONDS) == []
    assert reads.ended(0.0) == []  # and it is over
    reads.close()
    here.close()
    there.close()


def test_a_sender_whose_connection_is_shut_down_ends(serve: Callable[[ChunkSender], Serving]) -> None:
    source = Memory([[64 << 20]], 0, 1)
    sender = source.sender()
    served = serve(sender)
    served.socket.sendall(b"\x00\x00\x00\x00")  # and nobody takes what comes
    wait_for(lambda: sender.sent_bytes > 0)
    served.there.shutdown(socket.SHUT_RDWR)
    wait_for(lambda: served.result)
    assert served.result == [errno.EPIPE]


def test_requests_of_a_thread_go_to_threads_that_are_idle_first() -> None:
    """Of two connections neither gets a second request while the other has none."""
    pairs = [connected() for _ in range(2)]
    chunks = [[10]] * 4
    target = Memory(chunks, 0, None)
    reads = SocketReads([here for here, _ in pairs], hashed=False)
    for chunk in range(4):
        reads.ask(chunk, *target.of(chunk))
    asked = []
    for _, there in pairs:
        there.settimeout(PATIENT_SECONDS)
        asked.append(struct.unpack("<I", there.recv(4, socket.MSG_WAITALL))[0])
    assert len(set(asked)) == 2
    reads.close()
    for pair in pairs:
        for end in pair:
            end.close()


def test_arguments_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="0 connections, have to be 1 to 64"):
        SocketReads([], hashed=True)
    with pytest.raises(ValueError, match="2 addresses, 1 lengths and 1 chunks"):
        ChunkSender(q(1, 2), q(1), q(0, 1))
    with pytest.raises(ValueError, match="falls at chunk 1"):
        ChunkSender(q(1), q(1), q(0, 1, 0, 1))
    with pytest.raises(ValueError, match="end with the number of segments, 1"):
        ChunkSender(q(1), q(1), q(0, 2))
    sender = Memory([[1]] * 9, 0, 1).sender()
    with pytest.raises(ValueError, match="chunk 9 of 9"):
        sender.allow([8, 9])
    here, there = connected()
    reads = SocketReads([here], hashed=True)
    with pytest.raises(ValueError, match="without bytes"):
        reads.ask(0, q(), q())
    with pytest.raises(ValueError, match="no place in a request"):
        reads.ask(1 << 32, q(1), q(1))
    reads.close()
    here.close()
    there.close()


def test_a_connection_that_is_none() -> None:
    target = Memory([[10]], 0, None)
    closed, other = socket.socketpair()
    closed.close()
    other.close()
    reads = SocketReads([closed], hashed=True)
    reads.ask(0, *target.of(0))
    assert all_of(reads, 1)[0] == (errno.EBADF, b"")
    reads.close()


class TlsPair:
    """Both ends of connections by TLS."""

    def __init__(self, folder: Path) -> None:
        authority = Authority(folder)
        self._server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._server.load_cert_chain(*authority.issue("holder", "holder"))
        self._client = ssl.create_default_context(cafile=authority.ca_file)

    def connected(self) -> tuple[ssl.SSLSocket, ssl.SSLSocket]:
        here, there = connected()
        ends: list[ssl.SSLSocket] = []
        accepting = threading.Thread(target=lambda: ends.append(self._server.wrap_socket(there, server_side=True)))
        accepting.start()
        secured = self._client.wrap_socket(here, server_hostname="holder")
        accepting.join()
        return secured, ends[0]


@pytest.mark.parametrize("connections", [1, 3])
@pytest.mark.parametrize("gap", [0, 64])
def test_the_same_by_tls(tmp_path: Path, gap: int, connections: int) -> None:
    chunks = [[1], [0, 5, 0], [PIECE_BYTES], [PIECE_BYTES + 1, 17], [7] * 9000, [20 * PIECE_BYTES, 5, 16384, 16383, 9]]
    source, target = Memory(chunks, gap, 1), Memory(chunks, gap, None)
    sender, pair = source.sender(), TlsPair(tmp_path)
    ends = [pair.connected() for _ in range(connections)]
    results: list[int] = []
    serving = [threading.Thread(target=lambda end=end: results.append(sender.serve(end))) for _, end in ends]
    for thread in serving:
        thread.start()
    reads = SocketReads([here for here, _ in ends], hashed=True)
    for chunk in range(len(chunks)):
        reads.ask(chunk, *target.of(chunk))
    found = all_of(reads, len(chunks))
    assert reads.received_bytes == sender.sent_bytes == sum(map(sum, chunks))
    reads.close()
    assert (source.bytes == target.bytes).all()
    for chunk in range(len(chunks)):
        assert found[chunk] == (0, xxh3_64_segments(*source.of(chunk)).to_bytes(8, "little"))
    for thread in serving:
        thread.join()
    assert results == [0] * connections
    for both in ends:
        for end in both:
            end.close()


def test_by_tls_what_is_changed_on_its_way_is_no_message(tmp_path: Path) -> None:
    here, there = TlsPair(tmp_path).connected()
    target = Memory([[100]], 0, None)
    reads = SocketReads([here], hashed=True)
    reads.ask(0, *target.of(0))
    assert there.read(4) == bytes(4)
    record = b"\x17\x03\x03\x00\x40" + b"\x01" * 64  # by whoever does not have the keys
    socket.socket.send(there, record)
    assert all_of(reads, 1)[0] == (errno.EBADMSG, b"")
    assert (target.bytes == 0xEE).all()
    reads.close()
    here.close()
    there.close()


def test_by_tls_nothing_lands_after_the_end(tmp_path: Path) -> None:
    here, there = TlsPair(tmp_path).connected()
    target = Memory([[3 * PIECE_BYTES]], 0, None)
    reads = SocketReads([here], hashed=True)
    reads.ask(0, *target.of(0))
    there.sendall(struct.pack("<II", 0, 0) + b"\x01" * PIECE_BYTES)
    wait_for(lambda: reads.received_bytes == PIECE_BYTES)
    reads.close()  # while a thread waits for more
    before = target.bytes.copy()
    with suppress(OSError):
        there.sendall(b"\x02" * PIECE_BYTES)
    assert (target.bytes == before).all()
    # And a pool that nobody closed ends with its last use.
    other, end = TlsPair(tmp_path).connected()
    waiting = SocketReads([other], hashed=True)
    waiting.ask(0, *target.of(0))
    assert end.read(4) == bytes(4)
    del waiting
    assert end.read(1) == b""
    for each in (here, there, other, end):
        each.close()


def test_sockets_that_nobody_else_holds_stay_open_while_they_are_read() -> None:
    """Else their numbers are other connections' of the process, which would be read and shut down."""
    near, far = socket.socketpair()
    number, kept = near.fileno(), weakref.ref(near)
    reads = SocketReads([near], hashed=False)
    del near
    gc.collect()
    with far, socket.socket() as other:
        assert other.fileno() != number
        reads.close()
        still = kept()
        assert still is not None
        still.close()

"""The receiving end of HTTP/2 against a peer that sends what each test wants, frame by frame."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import hpack
import pytest

from mxserver.wire.files.http2 import (
    FRAME_HEADER_BYTES,
    MAX_FRAME_BYTES,
    PREFACE,
    Flag,
    FrameType,
    Http2Connection,
    Http2Error,
    StreamReset,
    frame,
)

WINDOW = 1024 * 1024


class Peer:
    """The server's end: reads and writes frames. Blocks for a minute at most."""

    def __init__(self, end: socket.socket) -> None:
        self.end = end
        end.settimeout(60)
        self._encoder = hpack.Encoder()
        assert self.exactly(len(PREFACE)) == PREFACE
        assert self.next_frame()[0] == FrameType.SETTINGS
        assert self.next_frame() == (FrameType.WINDOW_UPDATE, 0, 0, struct.pack(">I", WINDOW - 65_535))

    def exactly(self, count: int) -> bytes:
        got = b""
        while len(got) < count:
            part = self.end.recv(count - len(got))
            assert part, "the client closed"
            got += part
        return got

    def next_frame(self) -> tuple[int, int, int, bytes]:
        header = self.exactly(FRAME_HEADER_BYTES)
        kind, flags, stream = header[3], header[4], int.from_bytes(header[5:], "big")
        return kind, flags, stream, self.exactly(int.from_bytes(header[:3], "big"))

    def headers(self, **fields: str) -> bytes:
        return self._encoder.encode([(name.replace("__", ":"), value) for name, value in fields.items()])

    def send(self, *frames: bytes) -> None:
        self.end.sendall(b"".join(frames))

    def answer(self, *frames: bytes, stream: int = 1) -> None:
        """Takes a request, and answers with headers, the frames, and trailers."""
        assert [self.next_frame()[0] for _ in range(2)] == [FrameType.HEADERS, FrameType.DATA]
        self.send(
            frame(FrameType.HEADERS, Flag.END_HEADERS, stream, self.headers(__status="200")),
            *frames,
            frame(FrameType.HEADERS, Flag.END_HEADERS | Flag.END_STREAM, stream, self.headers(done="yes")),
        )


def data(payload: bytes, *, stream: int = 1, flags: int = 0) -> bytes:
    return frame(FrameType.DATA, flags, stream, payload)


@contextmanager
def connected(act: Callable[[Peer], None], *, silence: float = 60, ping: float = 60) -> Iterator[Http2Connection]:
    """A connection whose other end does `act` in a thread; what fails there fails the test."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        far, _ = listener.accept()
    failed: list[BaseException] = []

    def run() -> None:
        try:
            with far:
                act(Peer(far))
        except BaseException as error:  # noqa: BLE001 - raised again below
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    connection = Http2Connection(near, window_bytes=WINDOW, silence_seconds=silence, ping_seconds=ping)
    try:
        yield connection
    finally:
        connection.close()
        thread.join()
    if failed:
        raise failed[0]


def ask(connection: Http2Connection) -> None:
    connection.request([(":method", "POST"), (":path", "/x")], b"question")


def body(connection: Http2Connection, count: int = 100_000) -> bytes:
    got = bytearray(count)
    return bytes(got[: connection.read_into(memoryview(got))])


def test_body_over_many_frames_with_padding_and_strangers_between() -> None:
    def act(peer: Peer) -> None:
        peer.answer(
            data(b""),
            data(b"one "),
            frame(FrameType.SETTINGS, Flag.ACK, 0, b""),
            frame(FrameType.WINDOW_UPDATE, 0, 0, struct.pack(">I", 5)),
            data(b"\x03two \0\0\0", flags=Flag.PADDED),
            struct.pack(">I", 3)[1:] + bytes([0x77, 0xFF, 0, 0, 0, 1]) + b"???",  # a type that nobody knows
            data(b"\x02\0\0", flags=Flag.PADDED),
            data(b"three"),
        )

    with connected(act) as connection:
        ask(connection)
        first = bytearray(6)
        assert connection.read_into(memoryview(first)) == 6
        assert bytes(first) + body(connection) == b"one two three"
        assert connection.trailers == [("done", "yes")]
        assert connection.headers == [(":status", "200")]
        assert connection.is_free


def test_request_is_what_a_server_decodes() -> None:
    seen: list[object] = []

    def act(peer: Peer) -> None:
        decoder = hpack.Decoder()
        for stream in (1, 3):
            kind, flags, on, payload = peer.next_frame()
            assert (kind, flags, on) == (FrameType.HEADERS, Flag.END_HEADERS, stream)
            seen.append(decoder.decode(payload))
            assert peer.next_frame() == (FrameType.DATA, Flag.END_STREAM, stream, b"question")
            trailers = peer.headers(done="yes")
            peer.send(frame(FrameType.HEADERS, Flag.END_HEADERS | Flag.END_STREAM, stream, trailers))

    with connected(act) as connection:
        for _ in range(2):
            ask(connection)
            assert body(connection) == b""
            assert connection.headers == [("done", "yes")]
    assert seen == [[(":method", "POST"), (":path", "/x")]] * 2


def test_headers_in_pieces() -> None:
    def act(peer: Peer) -> None:
        peer.next_frame(), peer.next_frame()
        block = peer.headers(__status="200", long="x" * 5000)
        padded = b"\x02" + b"\0" * 5 + block[:100] + b"\0\0"
        peer.send(
            frame(FrameType.HEADERS, Flag.PADDED | Flag.PRIORITY | Flag.END_STREAM, 1, padded),
            frame(FrameType.CONTINUATION, 0, 1, block[100:2000]),
            frame(FrameType.CONTINUATION, Flag.END_HEADERS, 1, block[2000:]),
        )

    with connected(act) as connection:
        ask(connection)
        assert body(connection) == b""
        assert dict(connection.headers)["long"] == "x" * 5000


def test_settings_and_pings_are_answered() -> None:
    def act(peer: Peer) -> None:
        peer.send(frame(FrameType.SETTINGS, 0, 0, b""), frame(FrameType.PING, 0, 0, b"12345678"))
        peer.answer(data(b"x"))
        assert peer.next_frame() == (FrameType.SETTINGS, Flag.ACK, 0, b"")
        assert peer.next_frame() == (FrameType.PING, Flag.ACK, 0, b"12345678")

    with connected(act) as connection:
        ask(connection)
        assert body(connection) == b"x"


def test_windows_are_given_back_to_the_byte() -> None:
    """All that is received may be sent again: on the stream while it runs, on the connection in the end too."""
    total = 3 * WINDOW + 12_345
    given = {0: 0, 1: 0}

    def act(peer: Peer) -> None:
        peer.answer(*[data(b"x" * 15_000)] * (total // 15_000))
        while True:
            kind, _, stream, payload = peer.next_frame()
            if kind == FrameType.HEADERS:
                break
            assert kind == FrameType.WINDOW_UPDATE
            given[stream] += int.from_bytes(payload, "big")

    with connected(act) as connection:
        ask(connection)
        assert len(body(connection, total)) == total // 15_000 * 15_000
        ask(connection)
    assert given[0] == total // 15_000 * 15_000
    assert given[0] - WINDOW // 4 < given[1] <= given[0]


@pytest.mark.parametrize(
    ("frames", "says"),
    [
        ([data(b"x", stream=3)], "stream 3"),
        ([data(b"\x05abc", flags=Flag.PADDED)], "padding"),
        ([frame(FrameType.PUSH_PROMISE, 0, 1, b"")], "not allowed"),
        ([frame(FrameType.CONTINUATION, 0, 1, b"")], "not allowed"),
        ([frame(FrameType.HEADERS, Flag.END_HEADERS, 5, b"")], "stream 5"),
        ([frame(FrameType.HEADERS, Flag.END_HEADERS, 1, b"\xff\xff\xff\xff\xff\xff\xff\xff")], "cannot be read"),
        ([frame(FrameType.HEADERS, 0, 1, b""), data(b"x")], "between headers"),
        ([frame(FrameType.SETTINGS, 0, 0, b"x" * 70_000)], "70000 bytes"),
        ([frame(FrameType.GOAWAY, 0, 0, struct.pack(">II", 0, 2) + b"overload")], "overload"),
        ([struct.pack(">I", MAX_FRAME_BYTES)[1:] + bytes([0, 0, 0, 0, 0, 1]) + b"short"], "closed"),
        ([b"HTTP/1.1 400 Bad Request\r\n\r\n"], "bytes"),
        ([], "closed"),
    ],
)
def test_peers_that_break_the_rules(frames: list[bytes], says: str) -> None:
    def act(peer: Peer) -> None:
        peer.next_frame(), peer.next_frame()
        with suppress(OSError):  # the client may have closed before all of it was sent
            peer.send(*frames)

    with connected(act) as connection:
        ask(connection)
        with pytest.raises(Http2Error, match=says):
            body(connection)


def test_reset_has_its_code() -> None:
    def act(peer: Peer) -> None:
        peer.next_frame(), peer.next_frame()
        peer.send(data(b"some"), frame(FrameType.RST_STREAM, 0, 1, struct.pack(">I", 8)))

    with connected(act) as connection:
        ask(connection)
        with pytest.raises(StreamReset) as reset:
            body(connection)
        assert reset.value.code == 8
        assert not connection.is_free
        with pytest.raises(Http2Error, match="not ended"):
            ask(connection)


def test_server_that_goes_away_finishes_its_answer_first() -> None:
    def act(peer: Peer) -> None:
        peer.answer(frame(FrameType.GOAWAY, 0, 0, struct.pack(">II", 1, 0)), data(b"last"))

    with connected(act) as connection:
        ask(connection)
        assert body(connection) == b"last"
        assert not connection.is_free


def test_silent_server_is_asked_and_given_up_on() -> None:
    asked, done = threading.Event(), threading.Event()

    def act(peer: Peer) -> None:
        peer.next_frame(), peer.next_frame()
        assert peer.next_frame()[0] == FrameType.PING
        asked.set()
        done.wait(60)

    with connected(act, silence=0.05, ping=0.05) as connection:
        ask(connection)
        with pytest.raises(Http2Error, match="silent"):
            body(connection)
        assert asked.wait(60)
        done.set()


def test_server_that_only_takes_its_time_is_waited_for() -> None:
    def act(peer: Peer) -> None:
        peer.next_frame(), peer.next_frame()
        for _ in range(3):
            kind, _, _, payload = peer.next_frame()
            assert kind == FrameType.PING
            peer.send(frame(FrameType.PING, Flag.ACK, 0, payload))
        trailers = peer.headers(done="yes")
        peer.send(data(b"x"), frame(FrameType.HEADERS, Flag.END_HEADERS | Flag.END_STREAM, 1, trailers))

    with connected(act, silence=0.05, ping=60) as connection:
        ask(connection)
        assert body(connection) == b"x"


def test_abort_ends_a_read_of_another_thread() -> None:
    begun, done = threading.Event(), threading.Event()

    def act(peer: Peer) -> None:
        peer.next_frame(), peer.next_frame()
        peer.send(data(b"x"))
        begun.set()
        done.wait(60)

    with connected(act) as connection:
        ask(connection)
        aborting = threading.Thread(target=lambda: begun.wait(60) and connection.abort())
        aborting.start()
        with pytest.raises(Http2Error):
            body(connection)
        aborting.join()
        done.set()
        connection.close()
        connection.abort()

"""A minimal HTTP/2 client (RFC 9113) that receives an answer straight into the caller's memory.

grpcio copies each message three times, under the interpreter's lock, before a client sees it. Files are large: here
the kernel's copy is the only one. A connection runs one request at a time. What an answer does not need (pushes,
priorities, several streams) is refused or ignored as the RFC says.
"""

from __future__ import annotations

import socket
import ssl
import struct
from contextlib import suppress
from enum import IntEnum, IntFlag

import hpack

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
MAX_FRAME_BYTES = 16 * 1024 * 1024 - 1  # RFC 9113, 6.5.2
MAX_HEADER_BYTES = 64 * 1024
FRAME_HEADER_BYTES = 9
_FIRST_WINDOW_BYTES = 65_535

Headers = list[tuple[str, str]]


class FrameType(IntEnum):
    DATA = 0
    HEADERS = 1
    RST_STREAM = 3
    SETTINGS = 4
    PUSH_PROMISE = 5
    PING = 6
    GOAWAY = 7
    WINDOW_UPDATE = 8
    CONTINUATION = 9


class Flag(IntFlag):
    END_STREAM = 0x1  # DATA, HEADERS
    ACK = 0x1  # SETTINGS, PING
    END_HEADERS = 0x4
    PADDED = 0x8
    PRIORITY = 0x20


class Setting(IntEnum):
    ENABLE_PUSH = 2
    INITIAL_WINDOW_SIZE = 4
    MAX_FRAME_SIZE = 5
    MAX_HEADER_LIST_SIZE = 6


class Http2Error(Exception):
    """The connection is unusable: broken, silent, or the peer violated the protocol."""


class StreamReset(Http2Error):
    """The server ended the answer early. `code` is that of RFC 9113, section 7."""

    def __init__(self, code: int) -> None:
        super().__init__(f"the server reset the stream with code {code}")
        self.code = code


def frame(kind: FrameType, flags: int, stream: int, payload: bytes) -> bytes:
    """A whole frame."""
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


class Http2Connection:
    """Sends one request after the other over a connected socket, which it owns. Not thread-safe, except `abort`.

    After an error, or an answer that was not read to its end, only `close` may be called.
    """

    def __init__(
        self, connected: socket.socket, *, window_bytes: int, silence_seconds: float, ping_seconds: float
    ) -> None:
        """`window_bytes`: how much may be in flight to us. A peer that is silent for `silence_seconds` gets a ping;
        after `ping_seconds` more of silence the connection has failed. Raises Http2Error.
        """
        self._socket = connected
        self._window_bytes = window_bytes
        self._silence_seconds = silence_seconds
        self._ping_seconds = ping_seconds
        self._pinged = False
        self._decoder = hpack.Decoder(max_header_list_size=MAX_HEADER_BYTES)
        self._encoder = hpack.Encoder()
        self._encoder.header_table_size = 0  # ours are few: nothing to remember
        self._header = memoryview(bytearray(FRAME_HEADER_BYTES))
        self._stream = -1
        self._left = self._padding = 0  # of the DATA frame that is being read
        self._to_return = 0  # bytes that were read and not yet given back to the windows
        self._ended = True
        self._going_away = False
        self.headers: Headers = []  # of the answer that is read
        self.trailers: Headers = []
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._wait_at_most(silence_seconds)
        settings = {
            Setting.ENABLE_PUSH: 0,
            Setting.INITIAL_WINDOW_SIZE: window_bytes,
            Setting.MAX_FRAME_SIZE: MAX_FRAME_BYTES,
            Setting.MAX_HEADER_LIST_SIZE: MAX_HEADER_BYTES,
        }
        packed = b"".join(struct.pack(">HI", key, value) for key, value in settings.items())
        wider = struct.pack(">I", max(1, window_bytes - _FIRST_WINDOW_BYTES))
        self._send(PREFACE + frame(FrameType.SETTINGS, 0, 0, packed) + frame(FrameType.WINDOW_UPDATE, 0, 0, wider))

    @property
    def is_free(self) -> bool:
        """Whether another request can be sent: the answer before has been read to its end."""
        return self._ended and not self._left and not self._going_away

    def request(self, headers: Headers, body: bytes) -> None:
        """Sends a request with a short body (less than a first window); only while `is_free`. Raises Http2Error."""
        if not self.is_free:
            raise Http2Error("the previous answer has not ended, or the server is going away")
        self._stream += 2
        self._ended = False
        self.headers, self.trailers = [], []
        block = self._encoder.encode(headers, huffman=False)
        rest, self._to_return = self._to_return, 0  # of the answer before, whose own window is gone
        self._send(
            (frame(FrameType.WINDOW_UPDATE, 0, 0, struct.pack(">I", rest)) if rest else b"")
            + frame(FrameType.HEADERS, Flag.END_HEADERS, self._stream, block)
            + frame(FrameType.DATA, Flag.END_STREAM, self._stream, body)
        )

    def read_into(self, view: memoryview) -> int:
        """Fills `view` with the next bytes of the answer's body; returns how many there were before its end.

        Raises Http2Error, StreamReset.
        """
        filled = 0
        while filled < len(view):
            if not self._left and not self._next_data():
                break
            count = self._receive(view[filled : filled + self._left])
            self._left -= count
            filled += count
            self._give_back(count)
            if not self._left and self._padding:
                self._drop_padding()
        return filled

    def abort(self) -> None:
        """Ends a running request, in whichever thread; Http2Error is raised there."""
        with suppress(OSError):  # it is not connected any more
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Idempotent."""
        self._socket.close()

    # Frames.

    def _next_data(self) -> bool:
        """Advances to the next bytes of the body. False: the body has ended."""
        while not self._ended:
            self._exactly(self._header)
            length = int.from_bytes(self._header[:3], "big")
            kind, flags = self._header[3], self._header[4]
            stream = int.from_bytes(self._header[5:], "big") & 0x7FFF_FFFF
            if kind == FrameType.DATA:
                self._begin_data(length, flags, stream)
                if self._left:
                    return True
            else:
                self._other_frame(kind, flags, stream, self._payload(kind, length))
        return False

    def _begin_data(self, length: int, flags: int, stream: int) -> None:
        if stream != self._stream or length > MAX_FRAME_BYTES:
            raise Http2Error(f"a DATA frame of {length} bytes came for stream {stream}")
        self._padding = 0
        if flags & Flag.PADDED:
            size = memoryview(bytearray(1))
            self._exactly(size)
            length -= 1
            self._padding = size[0]
            self._give_back(1)
        if self._padding > length:
            raise Http2Error("a DATA frame has more padding than bytes")
        self._left = length - self._padding
        if not self._left and self._padding:
            self._drop_padding()
        self._ended = bool(flags & Flag.END_STREAM)

    def _drop_padding(self) -> None:
        count, self._padding = self._padding, 0
        self._exactly(memoryview(bytearray(count)))
        self._give_back(count)

    def _payload(self, kind: int, length: int) -> bytes:
        if length > MAX_HEADER_BYTES:
            raise Http2Error(f"a frame of type {kind} has {length} bytes")
        payload = bytearray(length)
        self._exactly(memoryview(payload))
        return bytes(payload)

    def _other_frame(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if kind == FrameType.HEADERS:
            self._take_headers(flags, stream, payload)
        elif kind == FrameType.SETTINGS and not flags & Flag.ACK:
            self._send(frame(FrameType.SETTINGS, Flag.ACK, 0, b""))
        elif kind == FrameType.PING and not flags & Flag.ACK:
            self._send(frame(FrameType.PING, Flag.ACK, 0, payload))
        elif kind == FrameType.RST_STREAM and stream == self._stream:
            raise StreamReset(int.from_bytes(payload[:4], "big"))
        elif kind == FrameType.GOAWAY:
            last = int.from_bytes(payload[:4], "big") & 0x7FFF_FFFF
            self._going_away = True
            if last < self._stream:  # else the server ends the connection after this answer
                raise Http2Error(f"the server is going away: {payload[8:200]!r}")
        elif kind in (FrameType.PUSH_PROMISE, FrameType.CONTINUATION):
            raise Http2Error(f"a frame of type {kind} came, which is not allowed here")

    def _take_headers(self, flags: int, stream: int, payload: bytes) -> None:
        if stream != self._stream:
            raise Http2Error(f"headers came for stream {stream}")
        if flags & Flag.PADDED:
            payload = payload[1 : len(payload) - payload[0]] if payload and payload[0] < len(payload) else b""
        if flags & Flag.PRIORITY:
            payload = payload[5:]
        last = flags
        while not last & Flag.END_HEADERS:
            self._exactly(self._header)
            length, kind, last = int.from_bytes(self._header[:3], "big"), self._header[3], self._header[4]
            if kind != FrameType.CONTINUATION or len(payload) + length > MAX_HEADER_BYTES:
                raise Http2Error(f"a frame of type {kind} and {length} bytes came between headers")
            payload += self._payload(kind, length)
        try:
            found: Headers = [(str(name), str(value)) for name, value in self._decoder.decode(payload)]
        except (hpack.HPACKError, UnicodeDecodeError) as error:
            raise Http2Error(f"headers cannot be read: {error}") from error
        self.headers, self.trailers = (self.headers, found) if self.headers else (found, [])
        self._ended = bool(flags & Flag.END_STREAM)

    def _give_back(self, count: int) -> None:
        """Lets the server send more, in steps of a quarter of the window."""
        self._to_return += count
        if self._to_return >= self._window_bytes // 4:
            step = struct.pack(">I", self._to_return)
            self._to_return = 0
            self._send(
                frame(FrameType.WINDOW_UPDATE, 0, 0, step) + frame(FrameType.WINDOW_UPDATE, 0, self._stream, step)
            )

    # The socket.

    def _wait_at_most(self, seconds: float) -> None:
        if isinstance(self._socket, ssl.SSLSocket):
            self._socket.settimeout(seconds)
            return
        # Not settimeout(): with it, each read is two system calls.
        whole = int(seconds)
        packed = struct.pack("ll", whole, int((seconds - whole) * 1_000_000))
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, packed)

    def _exactly(self, view: memoryview) -> None:
        while view:
            view = view[self._receive(view) :]

    def _receive(self, view: memoryview) -> int:
        while True:
            try:
                count = self._socket.recv_into(view)
            except (BlockingIOError, TimeoutError):
                if self._pinged:
                    raise Http2Error(
                        f"the server was silent for {self._silence_seconds + self._ping_seconds:.0f} s"
                    ) from None
                self._pinged = True
                self._wait_at_most(self._ping_seconds)
                self._send(frame(FrameType.PING, 0, 0, b"mx alive"))
                continue
            except (OSError, ValueError) as error:
                raise Http2Error(f"the connection broke: {error}") from error
            if not count:
                raise Http2Error("the server closed the connection")
            if self._pinged:
                self._pinged = False
                self._wait_at_most(self._silence_seconds)
            return count

    def _send(self, data: bytes) -> None:
        try:
            self._socket.sendall(data)
        except OSError as error:
            raise Http2Error(f"the connection broke: {error}") from error

"""Streams of a gRPC server without a client library, which would cost a bench more than the server: HTTP/2 by hand.

Each has a connection of its own, as workers on hosts of their own have. What HTTP/2 asks of a client is RFC 9113's; the
headers of the one request are literals of RFC 7541. One thread of a process reads all of them.
"""

from __future__ import annotations

import queue
import selectors
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import suppress

from mxserver.wire import ServerUnreachable
from mxserver.wire.proto import watch_pb2

__all__ = ["Http2Stream", "Watch", "WatchReader"]

PATH = "/model_express.mx.WatchService/WatchSources"
_DATA, _HEADERS, _RESET, _SETTINGS, _PING, _WINDOW = 0, 1, 3, 4, 6, 8
_ACK = _END = 1
_WHOLE = 4  # all of the headers are in one frame
_WINDOW_SETTING = 4
_LARGEST_WINDOW, _FIRST_WINDOW = (1 << 31) - 1, 65535


def _frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return struct.pack(">I", len(payload))[1:] + bytes((kind, flags)) + struct.pack(">I", stream) + payload


class Http2Stream:
    """One connection with one call of WatchSources. `take` is for one thread."""

    def __init__(self, address: str, request: watch_pb2.WatchSourcesRequest) -> None:
        """Raises OSError."""
        fields = [(":method", "POST"), (":scheme", "http"), (":path", PATH), (":authority", "x")]
        fields += [("te", "trailers"), ("content-type", "application/grpc")]
        block = b"".join(b"\0" + bytes((len(k),)) + k.encode() + bytes((len(v),)) + v.encode() for k, v in fields)
        body = request.SerializeToString()
        message = b"\0" + struct.pack(">I", len(body)) + body
        host, _, port = address.rpartition(":")
        self._read, self._told = b"", b""
        self.socket = socket.create_connection((host, int(port)))
        self.socket.sendall(
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
            + _frame(_SETTINGS, 0, 0, struct.pack(">HI", _WINDOW_SETTING, _LARGEST_WINDOW))
            + _frame(_WINDOW, 0, 0, struct.pack(">I", _LARGEST_WINDOW - _FIRST_WINDOW))
            + _frame(_HEADERS, _WHOLE, 1, block)
            + _frame(_DATA, _END, 1, message)
        )

    def take(self) -> list[bytes]:
        """Reads what has come; returns the messages that are whole now. Raises EOFError at the end, and OSError."""
        part = self.socket.recv(1 << 18)
        if not part:
            raise EOFError("the server closed the connection")
        self._read += part
        while len(self._read) >= 9:
            size, kind, flags = int.from_bytes(self._read[:3], "big"), self._read[3], self._read[4]
            if len(self._read) < 9 + size:
                break
            payload, self._read = self._read[9 : 9 + size], self._read[9 + size :]
            if kind == _DATA:
                self._told += payload
            elif kind in (_SETTINGS, _PING) and not flags & _ACK:
                self.socket.sendall(_frame(kind, _ACK, 0, payload if kind == _PING else b""))
            elif kind == _RESET or (kind == _HEADERS and flags & _END):
                raise EOFError("the server ended the stream")
        return self._messages()

    def _messages(self) -> list[bytes]:
        found = []
        while len(self._told) >= 5 and len(self._told) >= 5 + (size := int.from_bytes(self._told[1:5], "big")):
            found.append(self._told[5 : 5 + size])
            self._told = self._told[5 + size :]
        return found


class Watch:
    """One stream, as mxserver.wire.calls.OpenWatch is one: iterate in one thread, `cancel` in any."""

    def __init__(self, stream: Http2Stream) -> None:
        self.stream = stream
        self.told: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()  # None: the end

    def __iter__(self) -> Iterator[watch_pb2.SourcesNow]:
        while (message := self.told.get()) is not None:
            yield watch_pb2.SourcesNow.FromString(message)
        raise ServerUnreachable("WatchSources: the stream has ended")

    def cancel(self) -> None:
        """Ends it. Idempotent."""
        with suppress(OSError):
            self.stream.socket.shutdown(socket.SHUT_RDWR)


class WatchReader:
    """Reads all streams of a process by one thread. Thread-safe."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def open(self, address: str, request: watch_pb2.WatchSourcesRequest) -> Watch:
        """Raises ServerUnreachable."""
        try:
            watch = Watch(Http2Stream(address, request))
        except OSError as error:
            raise ServerUnreachable(f"WatchSources at {address}: {error}") from error
        with self._lock:
            self._selector.register(watch.stream.socket, selectors.EVENT_READ, watch)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="bench-streams", daemon=True)
                self._thread.start()
        return watch

    def _run(self) -> None:
        while True:
            for key, _ in self._selector.select():
                watch: Watch = key.data
                try:
                    for message in watch.stream.take():
                        watch.told.put(message)
                except (OSError, EOFError):
                    with self._lock:
                        self._selector.unregister(watch.stream.socket)
                    watch.stream.socket.close()
                    watch.told.put(None)

"""One connection to a port for files, plain or TLS, that brings much in one read.

A socket of Python's with a time-out polls before each read, so the kernel has the time-out here (SO_RCVTIMEO). And who
waits for much is not woken for each packet (SO_RCVLOWAT): that costs both ends more than the bytes themselves.
"""

from __future__ import annotations

import io
import socket
import ssl
import struct
from contextlib import suppress
from typing import BinaryIO

from mxserver.wire.calls import KEEPALIVE_INTERVAL_MS, KEEPALIVE_TIMEOUT_MS
from mxserver.wire.files.tls_records import TlsRecords

CONNECT_SECONDS = 5.0
SILENCE_SECONDS = (KEEPALIVE_INTERVAL_MS + KEEPALIVE_TIMEOUT_MS) / 1000
READ_BYTES = 1024 * 1024  # still in the processor's cache for who looks at the bytes next
WAKE_BYTES = 256 * 1024  # a reader who waits for more is woken for so many


class FileConnection:
    """What `http.client` needs of a socket, and `recv_into`. Not thread-safe, except `abort`.

    Reads and writes raise OSError; TimeoutError where nothing came or went for `silence_seconds`.
    """

    def __init__(
        self, host: str, port: int, context: ssl.SSLContext | None, *, silence_seconds: float = SILENCE_SECONDS
    ) -> None:
        """Connected, and for TLS shaken hands with a server that `context` trusts as `host`. Raises OSError."""
        self._silence_seconds = silence_seconds
        self._wake_bytes = 1
        self._tls: TlsRecords | None = None
        self._plain = socket.create_connection((host, port), CONNECT_SECONDS)
        try:
            self._plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if context is not None:
                self._tls = TlsRecords(context, self._received, self._sent, server_name=host)
            self._plain.settimeout(None)
            seconds, rest = divmod(silence_seconds, 1)
            for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
                self._plain.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", int(seconds), int(rest * 1e6)))
        except BaseException:
            self._plain.close()
            raise

    def recv_into(self, into: memoryview) -> int:
        """Reads at least one byte, and as many as are there; 0 at the connection's end."""
        return self._received(into) if self._tls is None else self._tls.recv_into(into)

    def await_bytes(self, count: int) -> None:
        """So many are sure to come: of many, a read waits for a good part. Say 0 before a line is read."""
        wake_bytes = WAKE_BYTES if count >= 2 * WAKE_BYTES else 1  # TLS may have read a record more than it gave
        if wake_bytes != self._wake_bytes:
            self._plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, wake_bytes)
            self._wake_bytes = wake_bytes

    def _received(self, into: memoryview) -> int:
        try:
            return self._plain.recv_into(into)
        except BlockingIOError as error:
            raise TimeoutError(f"no byte came for {self._silence_seconds:g} s") from error

    def sendall(self, data: bytes) -> None:
        """Sends all of it."""
        if self._tls is None:
            self._sent(data)
        else:
            self._tls.sendall(data)

    def _sent(self, data: bytes) -> None:
        try:
            self._plain.sendall(data)
        except BlockingIOError as error:
            raise TimeoutError(f"no byte was taken for {self._silence_seconds:g} s") from error

    def makefile(self, _mode: str) -> BinaryIO:
        """What is read line by line; `take_buffered` has what that read too much."""
        return io.BufferedReader(_Raw(self))

    def abort(self) -> None:
        """Ends a read that runs in another thread."""
        with suppress(OSError):
            self._plain.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Nothing: `http.client` calls it before an answer is read. `end` closes."""

    def end(self) -> None:
        """Closes the connection. Idempotent."""
        self._plain.close()


class _Raw(io.RawIOBase):
    def __init__(self, connection: FileConnection) -> None:
        super().__init__()
        self._connection = connection

    def readable(self) -> bool:
        return True

    def readinto(self, into: memoryview) -> int:  # type: ignore[override]
        return self._connection.recv_into(into)


def take_buffered(opened: io.BufferedReader, into: memoryview) -> int:
    """Fills the beginning of `into` with what `makefile`'s object has in its buffer; reads a little where it has
    nothing. 0 at the connection's end.
    """
    count = min(len(opened.peek(1)), len(into))
    return opened.readinto(into[:count]) if count else 0

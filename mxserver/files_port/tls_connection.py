"""What a server's connection by TLS gives `http.server` instead of a socket."""

from __future__ import annotations

import io
import socket
import ssl
import struct
import time
from typing import Any, BinaryIO

from mxserver.wire.files import TlsRecords

ENCRYPTED_REQUEST_BYTES = 16 * 1024  # of each connection: requests are short


class TlsConnection:
    """Not thread-safe. The kernel has the time-out: TimeoutError where nothing came or went for so long."""

    def __init__(self, plain: socket.socket, context: ssl.SSLContext, silence_seconds: float) -> None:
        """`plain` stays the caller's. Shakes hands. Raises OSError, ssl.SSLError among them."""
        self._plain = plain
        self._shaken_by: float | None = time.monotonic() + silence_seconds
        seconds, rest = divmod(silence_seconds, 1)
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            plain.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", int(seconds), int(rest * 1_000_000)))
        self._tls = TlsRecords(
            context, self._received, self._sent, server_name=None, encrypted_bytes=ENCRYPTED_REQUEST_BYTES
        )
        self._shaken_by = None
        plain.settimeout(None)

    def _received(self, into: memoryview) -> int:
        if self._shaken_by is not None:  # a handshake has this time in all, not for each byte
            self._plain.settimeout(max(0.001, self._shaken_by - time.monotonic()))
        try:
            return self._plain.recv_into(into)
        except BlockingIOError as error:
            raise TimeoutError("no byte came") from error

    def _sent(self, data: bytes) -> None:
        try:
            self._plain.sendall(data)
        except BlockingIOError as error:
            raise TimeoutError("no byte was taken") from error

    def recv_into(self, into: memoryview) -> int:
        """Reads at least one byte; 0 at the connection's end."""
        return self._tls.recv_into(into)

    def sendall(self, data: bytes | memoryview) -> None:
        """Sends all of it."""
        self._tls.sendall(data)

    def settimeout(self, _seconds: float | None) -> None:
        """Nothing: the kernel has it."""

    def setsockopt(self, level: int, option: int, value: int | bytes) -> None:
        """Of the socket."""
        self._plain.setsockopt(level, option, value)

    def makefile(self, mode: str, buffer_bytes: int) -> BinaryIO:
        """What requests are read from, or answers written to."""
        size_bytes = max(buffer_bytes, 8192)
        return io.BufferedReader(_Raw(self), size_bytes) if "r" in mode else io.BufferedWriter(_Raw(self), size_bytes)


class _Raw(io.RawIOBase):
    def __init__(self, connection: TlsConnection) -> None:
        super().__init__()
        self._connection = connection

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def readinto(self, into: memoryview) -> int:  # type: ignore[override]
        return self._connection.recv_into(into)

    def write(self, data: Any, /) -> int:
        self._connection.sendall(data)
        return len(data)

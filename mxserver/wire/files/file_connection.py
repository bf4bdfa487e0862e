"""One connection to a port for files, plain or TLS, that brings much in one read.

A socket of Python's with a time-out polls before each read, and its TLS gives a record of 16 KiB in each, by two reads
of the kernel. So the kernel has the time-out here (SO_RCVTIMEO), and what TLS decrypts comes through memory.
"""

from __future__ import annotations

import io
import socket
import ssl
import struct
from contextlib import suppress
from typing import BinaryIO

from mxserver.wire.calls import KEEPALIVE_INTERVAL_MS, KEEPALIVE_TIMEOUT_MS

CONNECT_SECONDS = 5.0
SILENCE_SECONDS = (KEEPALIVE_INTERVAL_MS + KEEPALIVE_TIMEOUT_MS) / 1000
READ_BYTES = 256 * 1024  # fits in a core's cache, so that whoever looks at the bytes next finds them there


class FileConnection:
    """What `http.client` needs of a socket, and `recv_into`. Not thread-safe, except `abort`.

    Reads and writes raise OSError; TimeoutError where nothing came or went for `silence_seconds`.
    """

    def __init__(
        self, host: str, port: int, context: ssl.SSLContext | None, *, silence_seconds: float = SILENCE_SECONDS
    ) -> None:
        """Connected, and for TLS shaken hands with a server that `context` trusts as `host`. Raises OSError."""
        self._silence_seconds = silence_seconds
        self._tls: ssl.SSLObject | None = None
        self._plain = socket.create_connection((host, port), CONNECT_SECONDS)
        try:
            self._plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if context is not None:
                self._shake_hands(context, host)
            self._plain.settimeout(None)
            seconds, rest = divmod(silence_seconds, 1)
            for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
                self._plain.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", int(seconds), int(rest * 1e6)))
        except BaseException:
            self._plain.close()
            raise

    def _shake_hands(self, context: ssl.SSLContext, host: str) -> None:
        self._encrypted = memoryview(bytearray(READ_BYTES))
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname=host)
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                self._bring_encrypted()
            else:
                break
        self._send_encrypted()

    def recv_into(self, into: memoryview) -> int:
        """Reads at least one byte, and as many as are there; 0 at the connection's end."""
        if self._tls is None:
            return self._received(into)
        done = 0
        while done < len(into):
            try:
                count: int = self._tls.read(len(into) - done, into[done:])  # type: ignore[assignment]
            except ssl.SSLWantReadError:
                if done:
                    break
                self._bring_encrypted()
            else:
                if not count:
                    break
                done += count
        return done

    def _bring_encrypted(self) -> None:
        self._send_encrypted()
        if count := self._received(self._encrypted):
            self._incoming.write(self._encrypted[:count])
        else:
            self._incoming.write_eof()  # TLS says whether it may end here

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
            self._tls.write(data)
            self._send_encrypted()

    def _send_encrypted(self) -> None:
        if self._outgoing.pending:
            self._sent(self._outgoing.read())

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

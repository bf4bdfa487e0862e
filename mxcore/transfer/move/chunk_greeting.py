"""How a connection to a holder's chunk port begins: the receiver shows its lease's token, the holder greets back.

Before that, both make it a TLS connection where the holder's offer says so: with the certificates and CAs of the
workers' gRPC services, TLS 1.3 alone. What follows is the same.
"""

from __future__ import annotations

import errno
import secrets
import socket
import ssl
import time
from contextlib import suppress
from dataclasses import dataclass

from mxserver.wire.credentials import ClientCredentials, ServerTls, server_context

__all__ = [
    "GREETING",
    "TOKEN_BYTES",
    "ChunkTls",
    "chunk_server_context",
    "cut_off",
    "expect_token",
    "show_token",
]

GREETING = b"mxchunk1"
TOKEN_BYTES = 16


@dataclass(frozen=True)
class ChunkTls:
    """What a receiver trusts and shows where a holder's chunk connections are TLS.

    `name` is to be in holders' certificates; empty: the address.
    """

    context: ssl.SSLContext
    name: str

    @classmethod
    def of(cls, credentials: ClientCredentials) -> ChunkTls:
        """Reads the files, so that new connections have their newest state. Raises SettingError."""
        context = credentials.ssl_context()
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        return cls(context, credentials.peer_name)

    def secured(self, connection: socket.socket, host: str, seconds: float) -> ssl.SSLSocket:
        """The connection by TLS, within `seconds`; the given one is used up. Raises OSError, of it ssl.SSLError."""
        connection.settimeout(seconds)
        return self.context.wrap_socket(connection, server_hostname=self.name or host)


def chunk_server_context(tls: ServerTls) -> ssl.SSLContext:
    """For a holder's chunk port: who may connect is the same as at its gRPC port. Raises SettingError."""
    context = server_context(tls, ask_clients=True)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.num_tickets = 0  # nobody comes back to an earlier connection
    return context


def cut_off(connection: socket.socket) -> None:
    """Shuts a connection down, from any thread: whoever sends or receives on it fails.

    An SSLSocket's own `shutdown` would forget the keys first, and a thread that sends meanwhile go on in clear.
    """
    with suppress(OSError):
        socket.socket.shutdown(connection, socket.SHUT_RDWR)


def show_token(connection: socket.socket, token: bytes, seconds: float) -> None:
    """The receiver's side, within `seconds`. Raises OSError unless a holder accepts the token."""
    connection.settimeout(seconds)
    connection.sendall(GREETING + token)
    said = _receive(connection, len(GREETING), seconds)
    connection.settimeout(None)
    if said != GREETING:
        raise OSError(errno.EPROTO, f"it answers {said!r}" if said else "it closes the connection")


def expect_token(connection: socket.socket, seconds: float) -> bytes:
    """The holder's side: the token that was shown within `seconds`, empty for another protocol. Raises OSError.

    The time is that of the handshake, too. The holder answers a token that it knows with the GREETING.
    """
    give_up_at = time.monotonic() + seconds
    if isinstance(connection, ssl.SSLSocket):
        connection.settimeout(seconds)
        connection.do_handshake()
    shown = _receive(connection, len(GREETING) + TOKEN_BYTES, max(give_up_at - time.monotonic(), 0.001))
    connection.settimeout(None)
    ours = secrets.compare_digest(shown[: len(GREETING)], GREETING) and len(shown) == len(GREETING) + TOKEN_BYTES
    return shown[len(GREETING) :] if ours else b""


def _receive(connection: socket.socket, count: int, seconds: float) -> bytes:
    """`count` bytes, or fewer where the other side closes. Raises OSError; TimeoutError after `seconds` in all."""
    received, deadline = b"", time.monotonic() + seconds
    while len(received) < count:
        connection.settimeout(max(deadline - time.monotonic(), 0.001))
        if not (more := connection.recv(count - len(received))):
            break
        received += more
    return received

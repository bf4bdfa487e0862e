"""How a connection to a holder's chunk port begins: the receiver shows its lease's token, the holder greets back."""

from __future__ import annotations

import errno
import secrets
import socket
import time

__all__ = ["GREETING", "TOKEN_BYTES", "expect_token", "show_token"]

GREETING = b"mxchunk1"
TOKEN_BYTES = 16


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

    The holder answers a token that it knows with the GREETING.
    """
    shown = _receive(connection, len(GREETING) + TOKEN_BYTES, seconds)
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

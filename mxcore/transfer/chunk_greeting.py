"""How a connection to a holder's chunk port begins: the receiver shows its lease's token, the holder greets back."""

from __future__ import annotations

import errno
import secrets
import socket

__all__ = ["GREETING", "TOKEN_BYTES", "expect_token", "show_token"]

GREETING = b"mxchunk1"
TOKEN_BYTES = 16


def show_token(connection: socket.socket, token: bytes) -> None:
    """The receiver's side, on a connection with a time-out. Raises OSError where nobody of ours answers, or not yes."""
    connection.sendall(GREETING + token)
    if (said := _receive(connection, len(GREETING))) != GREETING:
        raise OSError(errno.EPROTO, f"it answers {said!r}" if said else "it closes the connection")


def expect_token(connection: socket.socket, seconds: float) -> bytes:
    """The holder's side: the token that was shown, empty where somebody else is calling. Raises OSError.

    Whoever knows the token is answered with the GREETING.
    """
    connection.settimeout(seconds)
    shown = _receive(connection, len(GREETING) + TOKEN_BYTES)
    connection.settimeout(None)
    ours = secrets.compare_digest(shown[: len(GREETING)], GREETING) and len(shown) == len(GREETING) + TOKEN_BYTES
    return shown[len(GREETING) :] if ours else b""


def _receive(connection: socket.socket, count: int) -> bytes:
    """So many bytes, or fewer where the other side closes. Raises OSError."""
    received = b""
    while len(received) < count and (more := connection.recv(count - len(received))):
        received += more
    return received

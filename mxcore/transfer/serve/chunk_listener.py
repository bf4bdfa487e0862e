"""The chunk port, from which receivers fetch chunks over TCP, with a thread for each connection.

A receiver shows the token that OpenTransfer gave it, and gets the greeting back; then it asks for chunks, as described
in socket_chunks.h, and the compiled core sends them from the holder's memory. A connection ends with its lease. With
`tls` all of this is within a TLS connection.
"""

from __future__ import annotations

import errno
import logging
import socket
import ssl
import threading

from mxcore.errors import TransferError
from mxcore.transfer.move import cut_off, expect_token
from mxcore.transfer.serve.holder import MOST_CONNECTIONS, Holder
from mxserver.wire import SettingError

__all__ = ["ChunkListener"]

logger = logging.getLogger(__name__)

_GREETING_SECONDS = 5.0
_STRANGERS = 8  # connections that have not shown a token yet, besides those of all readers
_ROOM_SECONDS = 1.0  # until a connection that is cut off has ended
_BACKLOG = 64
_LAST_PORT = 65535


class ChunkListener:
    """Listens as soon as it exists, on `host` alone or ("") everywhere.

    A port in use (or 0) becomes a free one: `port` has the real one. Raises SettingError when there is nothing to
    listen on.
    """

    def __init__(self, holder: Holder, host: str, port: int, tls: ssl.SSLContext | None = None) -> None:
        self._tls = tls
        self._holder = holder
        self._listener = _listen(host, port)
        self.port = int(self._listener.getsockname()[1])
        self._room = threading.BoundedSemaphore(MOST_CONNECTIONS * holder.most_readers + _STRANGERS)
        self._lock = threading.Lock()
        self._greeting: dict[socket.socket, None] = {}  # connections without a token yet, the oldest first
        self._closed = False
        self._accepting = threading.Thread(target=self._accept, name="mx-chunk-port", daemon=True)
        self._accepting.start()

    def close(self) -> None:
        """Accepts no more connections; open ones end with their leases. Idempotent."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            strangers = list(self._greeting)
        for connection in strangers:
            cut_off(connection)
        cut_off(self._listener)  # wakes the thread that accepts
        self._accepting.join()
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, peer = self._listener.accept()
            except OSError as error:
                if self._closed:
                    return
                if error.errno not in (errno.ECONNABORTED, errno.EINTR):
                    logger.warning("the chunk port %d: %s", self.port, error)
                    threading.Event().wait(0.1)  # out of files, say: not as fast as it can
                continue
            if not (self._room.acquire(blocking=False) or self._make_room()):
                logger.warning("a connection of %s to the chunk port is refused: there are too many", peer[0])
                connection.close()
                continue
            try:
                threading.Thread(target=self._serve, args=(connection,), name="mx-chunks-out", daemon=True).start()
            except RuntimeError as error:  # the process may have no more threads
                logger.warning("a connection of %s to the chunk port is refused: %s", peer[0], error)
                self._room.release()
                connection.close()

    def _make_room(self) -> bool:
        """Cuts off the oldest connection without a token: a reader shows it at once."""
        with self._lock:
            longest = next(iter(self._greeting), None)
        if longest is None:
            return False
        cut_off(longest)
        return self._room.acquire(timeout=_ROOM_SECONDS)

    def _serve(self, connection: socket.socket) -> None:
        """One connection, from greeting to end."""
        try:
            # A small chunk, or the end of one, does not wait for the receiver's acknowledgement.
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._tls is not None:
                connection = self._tls.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)
            if token := self._greet(connection):
                self._holder.send_chunks(token, connection)
        except (OSError, TransferError) as error:
            logger.debug("a connection to the chunk port ended: %s", error)
        finally:
            connection.close()
            self._room.release()

    def _greet(self, connection: socket.socket) -> bytes:
        """The token that was shown; empty for another protocol. Raises OSError."""
        with self._lock:
            if self._closed:
                return b""
            self._greeting[connection] = None
        try:
            return expect_token(connection, _GREETING_SECONDS)
        finally:
            with self._lock:
                self._greeting.pop(connection, None)


def _listen(host: str, port: int) -> socket.socket:
    for candidate in dict.fromkeys((port if port <= _LAST_PORT else 0, 0)):  # above it: of a high rank
        try:
            if host:
                family = socket.getaddrinfo(host, candidate, type=socket.SOCK_STREAM)[0][0]
                return socket.create_server((host, candidate), family=family, backlog=_BACKLOG)
            if socket.has_dualstack_ipv6():
                return socket.create_server(
                    ("", candidate), family=socket.AF_INET6, dualstack_ipv6=True, backlog=_BACKLOG
                )
            return socket.create_server(("", candidate), backlog=_BACKLOG)
        except OSError as error:
            if candidate:
                logger.info("chunk port %d cannot be had (%s): another one is taken", candidate, error)
            else:
                failure = error
    raise SettingError(f"no port for chunks at {host or 'any address'}: {failure}; check MX_WORKER_HOST")

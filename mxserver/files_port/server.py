"""The port for files: a thread a connection, sendfile where it is plain.

Beside uvicorn, because that one cannot: it knows neither sendfile nor ASGI's `http.response.pathsend`, and copies each
block through Python. The standard library's server does both, and needs no package.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import socketserver
import ssl
import threading
from collections import Counter
from typing import Any

from mxserver.files_port.range_digests import RangeDigests
from mxserver.files_port.requests import Answers, FileRequests, Shared
from mxserver.files_port.tls_connection import TlsConnection
from mxserver.models import OpenCache
from mxserver.security import Authenticator
from mxserver.wire.credentials import ServerTls, server_context

_LOG = logging.getLogger(__name__)

MAX_CONNECTIONS = 1024  # each has a thread
BACKLOG = 256


class FilesPort:
    """Listens from its constructor on, answers from `start` to `stop`. Thread-safe."""

    def __init__(
        self,
        host: str,
        port: int,
        opened: OpenCache,
        *,
        tls: ServerTls | None = None,
        authenticator: Authenticator | None = None,
        most_per_host: int,
        silence_seconds: float = 10.0,
    ) -> None:
        """`most_per_host`: connections that one host may have open; `silence_seconds`: a connection is closed that has
        no request for so long, or whose client takes no byte. Raises OSError when it cannot listen there.
        """
        context = server_context(tls, ask_clients=True) if tls is not None else None
        self._answers = Answers()
        shared = Shared(opened, authenticator, RangeDigests(), self._answers, silence_seconds)
        self._server = _Server(host, port, shared, context, most_per_host)
        self.port = int(self._server.server_address[1])
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Answers from now on."""
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.2,), name="files", daemon=True)
        self._thread.start()

    def drain(self) -> None:
        """Takes no new connections; those that are open have one more answer. Idempotent."""
        self._answers.are_last = True
        thread, self._thread = self._thread, None
        if thread is not None:
            self._server.shutdown()
            thread.join()
        self._server.server_close()

    def wait(self, seconds: float) -> bool:
        """Until no answer is under way; returns whether that was so within the time."""
        return self._answers.wait(seconds)

    def stop(self) -> None:
        """Cuts what is open, and releases the port. Idempotent."""
        self.drain()
        self._server.cut_all()


class _Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False
    request_queue_size = BACKLOG

    def __init__(
        self, host: str, port: int, shared: Shared, context: ssl.SSLContext | None, most_per_host: int
    ) -> None:
        family, _, _, _, place = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE | socket.AI_NUMERICSERV
        )[0]
        self.address_family = family
        self.shared = shared
        self._context = context
        self._most_per_host = most_per_host
        self._lock = threading.Lock()
        self._open: dict[socket.socket, str] = {}
        self._hosts: Counter[str] = Counter()
        super().__init__((str(place[0]), int(place[1])), FileRequests)

    def server_bind(self) -> None:
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        super().server_bind()

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Whether this connection is one too many: it is closed, and its client tries again later."""
        host = str(client_address[0])
        with self._lock:
            if len(self._open) >= MAX_CONNECTIONS or self._hosts[host] >= self._most_per_host:
                return False
            self._open[request] = host
            self._hosts[host] += 1
            return True

    def finish_request(self, request: Any, client_address: Any) -> None:
        """In the connection's thread: a handshake that takes its time holds up nobody else."""
        if self._context is None:
            FileRequests(request, client_address, self)
            return
        with contextlib.suppress(OSError):
            secured = TlsConnection(request, self._context, self.shared.silence_seconds)
            FileRequests(secured, client_address, self)  # type: ignore[arg-type]

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            host = self._open.pop(request, None)
            if host is not None:
                self._hosts[host] -= 1
                if not self._hosts[host]:
                    del self._hosts[host]
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        _LOG.debug("a connection for files ended client=%s", client_address, exc_info=True)

    def cut_all(self) -> None:
        with self._lock:
            for request in self._open:
                with contextlib.suppress(OSError):
                    socket.socket.shutdown(request, socket.SHUT_RDWR)

"""The HTTP server: uvicorn in a thread of its own, with a deadline for every request.

Made for probes, scrapes and a few open pages. uvicorn itself lets a client that sends or reads slowly keep its
connection for ever; here it is cut. uvicorn also answers 503 to everybody while too many connections are open, probes
included; here the connection that was silent longest is closed for the new one
(tests/web/test_http.py: test_connections_of_others_never_turn_a_probe_red).
"""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
from typing import Any, cast

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from mxserver.wire.credentials import ServerTls, server_context

MAX_CONNECTIONS = 256
HEAD_SECONDS = 5.0  # from the connection, or the last answer, to a complete request
ANSWER_SECONDS = 30.0  # from then until the client has the answer
MAX_HEAD_BYTES = 16 * 1024
END_SECONDS = 2  # for answers that are under way when the server stops


class HttpServer:
    """Serves an ASGI application until `stop`. The constructor listens already, `start` answers."""

    def __init__(self, host: str, port: int, app: ASGIApp, tls: ServerTls | None = None) -> None:
        """With IPv6, `::` includes all of IPv4. Raises OSError when it cannot listen there, and SettingError."""
        config = uvicorn.Config(
            app,
            http=_Protocol,
            ws="none",
            loop="asyncio",
            lifespan="off",
            log_config=None,
            log_level="error",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            h11_max_incomplete_event_size=MAX_HEAD_BYTES,
            timeout_graceful_shutdown=END_SECONDS,
        )
        config.load()
        if tls is not None:
            config.ssl = server_context(tls)
        family, _, _, _, place = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE | socket.AI_NUMERICSERV
        )[0]
        self._socket = socket.create_server(
            cast(tuple[str, int], place[:2]),
            family=family,
            backlog=MAX_CONNECTIONS,
            dualstack_ipv6=family == socket.AF_INET6,
        )
        self.port = int(self._socket.getsockname()[1])
        self._server = uvicorn.Server(config)
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Answers from now on."""
        self._thread = threading.Thread(target=self._server.run, args=([self._socket],), name="http", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Releases the port. Idempotent."""
        self._server.should_exit = True
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._socket.close()


class _Protocol(H11Protocol):
    """Cuts connections without progress."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as uvicorn has it
        super().connection_made(transport)
        self._answering: Any = None
        self._heard_at = self.loop.time()  # when it came, or got its last answer
        if len(self.connections) > MAX_CONNECTIONS:
            self._make_room()
        self._deadline = self.loop.call_later(HEAD_SECONDS, self._late)

    def connection_lost(self, exc: Exception | None) -> None:
        self._deadline.cancel()
        super().connection_lost(exc)

    def _make_room(self) -> None:
        """Closes the connection that was silent longest; one that waits for its answer only when all do."""
        others = [one for one in self.connections if one is not self and isinstance(one, _Protocol)]
        oldest = min(others, key=lambda one: (one._is_answered(), one._heard_at))
        self.connections.discard(oldest)  # at once: several may come before the loop tells of its end
        oldest.transport.abort()

    def _is_answered(self) -> bool:
        """Whether a request is being answered at the moment."""
        return self.cycle is not None and not self.cycle.response_complete

    def on_response_complete(self) -> None:
        self._heard_at = self.loop.time()
        self._deadline.cancel()
        self._deadline = self.loop.call_later(HEAD_SECONDS, self._late)
        super().on_response_complete()

    def _late(self) -> None:
        """The time for the request is over. A request that has arrived gets its time for the answer, once."""
        running = self._is_answered()
        if running and self.cycle is not self._answering:
            self._answering = self.cycle
            self._deadline = self.loop.call_later(ANSWER_SECONDS, self._late)
            return
        logging.getLogger(__name__).debug("connection was cut client=%s answering=%s", self.client, running)
        self.transport.abort()

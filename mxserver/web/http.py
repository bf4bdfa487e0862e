"""The HTTP server: a thread for each of a bounded number of connections, one request a connection.

Made for probes, scrapes and a few open pages, on Python's own HTTP parser. A client that sends slowly holds its
thread for `HEAD_SECONDS` at most, so that nobody can keep the probes out for long.
"""

from __future__ import annotations

import gzip
import io
import logging
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from typing import NamedTuple
from urllib.parse import parse_qs, urlsplit

_LOG = logging.getLogger(__name__)

MAX_CONNECTIONS = 64
HEAD_SECONDS = 5.0
WRITE_SECONDS = 10.0
MAX_HEAD_BYTES = 16 * 1024
COMPRESS_FROM_BYTES = 1024

SECURITY_HEADERS = (
    (
        "Content-Security-Policy",
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
    ("X-Content-Type-Options", "nosniff"),
    ("Referrer-Policy", "no-referrer"),
    ("Cross-Origin-Opener-Policy", "same-origin"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
)


class Request(NamedTuple):
    """What a page is asked with; of a repeated query name, the last value counts."""

    query: Mapping[str, str]
    accept: str


@dataclass(frozen=True)
class Answer:
    """What a page answers."""

    body: bytes
    content_type: str = "text/plain; charset=utf-8"
    status: HTTPStatus = HTTPStatus.OK
    etag: str = ""
    headers: tuple[tuple[str, str], ...] = field(default=())


Page = Callable[[Request], Answer]


class HttpServer(socketserver.ThreadingMixIn, socketserver.TCPServer):
    """Serves pages by path until `stop`. The constructor listens already, `start` answers."""

    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, host: str, port: int, pages: Mapping[str, Page]) -> None:
        """Raises OSError when it cannot listen there."""
        family, _, _, _, place = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE | socket.AI_NUMERICSERV
        )[0]
        self.address_family = family
        self.pages = pages
        self._free = threading.BoundedSemaphore(MAX_CONNECTIONS)
        self._thread: threading.Thread | None = None
        super().__init__(place[:2], _Handler)  # type: ignore[arg-type] # an address is a string and a number
        self.port = int(self.socket.getsockname()[1])

    def server_bind(self) -> None:
        """With IPv6, `::` is all of IPv4 as well."""
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        super().server_bind()

    def start(self) -> None:
        self._thread = threading.Thread(target=self.serve_forever, args=(0.05,), name="http", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Lets go of the port. Idempotent."""
        if self._thread is not None:
            self.shutdown()
            self._thread.join()
            self._thread = None
        self.server_close()

    def process_request(self, request: socket.socket | tuple[bytes, socket.socket], client_address: object) -> None:
        """Runs in the accepting thread: turns away who is too many."""
        assert isinstance(request, socket.socket)  # noqa: S101 - of a stream server
        if not self._free.acquire(blocking=False):
            _LOG.debug("too many connections limit=%d", MAX_CONNECTIONS)
            request.setblocking(False)
            try:
                request.send(b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            except OSError as error:
                _LOG.debug("turned away in silence reason=%s", error)
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(
        self, request: socket.socket | tuple[bytes, socket.socket], client_address: object
    ) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away is not worth more than a line; a page that failed has logged by itself."""
        _LOG.debug("connection ended client=%s", client_address, exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HttpServer

    def setup(self) -> None:
        """Reads the request's head under one deadline, however slowly it is sent."""
        self.connection: socket.socket = self.request
        self.rfile = io.BytesIO(_read_head(self.connection))
        self.connection.settimeout(WRITE_SECONDS)
        self.wfile = self.connection.makefile("wb")

    def handle(self) -> None:
        """One request a connection: nobody keeps a thread for nothing."""
        self.close_connection = True
        self.handle_one_request()

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def __getattr__(self, name: str) -> Callable[[], None]:
        """Any other method is refused; what the base class looks up is `do_` and the method's name."""
        if name.startswith("do_"):
            return self._refuse_method
        raise AttributeError(name)

    def version_string(self) -> str:
        """Nothing about Python's version in the header Server."""
        return "mxserver"

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class' name
        _LOG.debug("http client=%s %s", self.client_address[0], format % args)

    def _refuse_method(self) -> None:
        refusal = Answer(
            b"only GET and HEAD\n", status=HTTPStatus.METHOD_NOT_ALLOWED, headers=(("Allow", "GET, HEAD"),)
        )
        self._send(refusal)

    def _answer(self) -> None:
        url = urlsplit(self.path)
        page = self.server.pages.get(url.path)
        if page is None:
            paths = " ".join(sorted(self.server.pages))
            self._send(Answer(f"nothing here; there is {paths}\n".encode(), status=HTTPStatus.NOT_FOUND))
            return
        query = {name: values[-1] for name, values in parse_qs(url.query).items()}
        try:
            answer = page(Request(query, self.headers.get("Accept", "")))
        except Exception:  # noqa: BLE001 - whatever it is, it costs one answer, and is logged
            _LOG.exception("page failed path=%s", url.path)
            answer = Answer(
                b"the page failed; the server's log has the reason\n", status=HTTPStatus.INTERNAL_SERVER_ERROR
            )
        self._send(answer)

    def _send(self, answer: Answer) -> None:
        body = answer.body
        unchanged = bool(answer.etag) and self.headers.get("If-None-Match") == answer.etag
        self.send_response(HTTPStatus.NOT_MODIFIED if unchanged else answer.status)
        if answer.etag:
            self.send_header("ETag", answer.etag)
        self.send_header("Cache-Control", "no-cache" if answer.etag else "no-store")
        for name, value in (*answer.headers, *SECURITY_HEADERS):
            self.send_header(name, value)
        self.send_header("Connection", "close")
        if not unchanged:
            self.send_header("Vary", "Accept, Accept-Encoding")
            if len(body) >= COMPRESS_FROM_BYTES and "gzip" in self.headers.get("Accept-Encoding", ""):
                body = gzip.compress(body, compresslevel=3, mtime=0)
                self.send_header("Content-Encoding", "gzip")
            self.send_header("Content-Type", answer.content_type)
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD" and not unchanged:
            self.wfile.write(body)


def _read_head(connection: socket.socket) -> bytes:
    """What the client sent up to the empty line; cut where it takes too long or sends too much."""
    deadline = time.monotonic() + HEAD_SECONDS
    head = bytearray()
    while b"\r\n\r\n" not in head and b"\n\n" not in head and len(head) < MAX_HEAD_BYTES:
        left = deadline - time.monotonic()
        if left <= 0:
            return b""
        connection.settimeout(left)
        try:
            received = connection.recv(4096)
        except TimeoutError:
            return b""
        if not received:
            return b""
        head += received
    return bytes(head)

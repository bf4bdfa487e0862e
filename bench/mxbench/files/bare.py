"""What `mx bench files` compares with: the standard library's HTTP server with sendfile, and a pair of TLS sockets."""

from __future__ import annotations

import http.client
import http.server
import multiprocessing
import os
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

BLOCK_BYTES = 1024 * 1024


class _Files(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = 0
    disable_nagle_algorithm = True

    def log_message(self, *_: Any) -> None:
        """Nothing."""

    def do_GET(self) -> None:
        with Path(self.path).open("rb", buffering=0) as opened:
            size = os.fstat(opened.fileno()).st_size
            self.send_response(200)
            self.send_header("Content-Length", str(size))
            self.end_headers()
            if size:
                self.connection.sendfile(opened)


def _http_server(pipe: Connection) -> None:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Files)
    pipe.send((server.server_port, os.getpid()))
    server.serve_forever()


def _tls_server(pipe: Connection, cert_file: Path, key_file: Path) -> None:
    """Sends as many bytes as the client's 8 bytes say, out of one block, again and again."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert_file, key_file)
    listener = socket.create_server(("127.0.0.1", 0))
    pipe.send((listener.getsockname()[1], os.getpid()))
    block = memoryview(os.urandom(BLOCK_BYTES))

    def serve(plain: socket.socket) -> None:
        with context.wrap_socket(plain, server_side=True) as secured:
            left = int.from_bytes(secured.recv(8), "little")
            while left:
                secured.sendall(block[:left])
                left -= min(left, len(block))
            secured.recv(1)

    while True:
        threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()


@contextmanager
def started(target: Any, *arguments: Any) -> Iterator[tuple[int, int]]:
    """A server in a process of its own: its port and process id."""
    near, far = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=target, args=(far, *arguments), daemon=True)
    process.start()
    yield near.recv()
    process.kill()
    process.join()


@contextmanager
def bare_http() -> Iterator[tuple[int, int]]:
    with started(_http_server) as place:
        yield place


@contextmanager
def bare_tls(cert_file: Path, key_file: Path) -> Iterator[tuple[int, int]]:
    with started(_tls_server, cert_file, key_file) as place:
        yield place


def take_http(port: int, files: list[Path], into: memoryview | None) -> None:
    """GETs the files over one connection, into memory or into one block that is dropped."""
    connection = http.client.HTTPConnection("127.0.0.1", port)
    block = memoryview(bytearray(BLOCK_BYTES))
    at = 0
    for file in files:
        connection.request("GET", str(file))
        answer = connection.getresponse()
        left = answer.length or 0
        while left:
            data = block[:left] if into is None else into[at : at + min(left, BLOCK_BYTES)]
            count = answer.readinto(data)
            if not count:
                raise ConnectionError("the bare server ended early")
            left -= count
            at += count
        answer.read()
    connection.close()


def take_tls(port: int, ca_file: Path, count: int, into: memoryview | None) -> None:
    """Receives so many bytes over one TLS connection, into memory or into one block that is dropped."""
    context = ssl.create_default_context(cafile=str(ca_file))
    block = memoryview(bytearray(BLOCK_BYTES))
    with context.wrap_socket(socket.create_connection(("127.0.0.1", port)), server_hostname="localhost") as secured:
        secured.sendall(count.to_bytes(8, "little"))
        at = 0
        while at < count:
            part = block[: count - at] if into is None else into[at : at + BLOCK_BYTES]
            received = secured.recv_into(part)
            if not received:
                raise ConnectionError("the bare server ended early")
            at += received

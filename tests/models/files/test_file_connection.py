"""The client's connection to a port for files, against servers of few lines: plain and TLS, silent, cut."""

from __future__ import annotations

import hashlib
import http.client
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from mxbench.stand_ins.authority import Authority
from mxserver.wire.files.file_connection import WAKE_BYTES, FileConnection, take_buffered
from tests.models.conftest import pattern

BODY = pattern(1_000_003)
Answer = Callable[[socket.socket, threading.Event], None]
Connect = Callable[..., FileConnection]


@pytest.fixture(params=["plain", "tls"])
def connect(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Connect]:
    """Connects to a server that answers a connection by calling what it is given."""
    trusted = serving = None
    if request.param == "tls":
        authority = Authority(tmp_path)
        serving = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        serving.load_cert_chain(*authority.issue("server", "localhost"))
        trusted = ssl.create_default_context(cafile=str(authority.ca_file))
    over = threading.Event()
    made: list[FileConnection] = []
    threads: list[threading.Thread] = []

    def start(
        answer: Callable[[socket.socket, threading.Event], None], *, silence_seconds: float = 60
    ) -> FileConnection:
        listener = socket.create_server(("127.0.0.1", 0))

        def serve() -> None:
            with listener, listener.accept()[0] as accepted, suppress(OSError):
                if serving is None:
                    answer(accepted, over)
                else:
                    with serving.wrap_socket(accepted, server_side=True) as secured:
                        answer(secured, over)

        threads.append(threading.Thread(target=serve))
        threads[-1].start()
        made.append(FileConnection("localhost", listener.getsockname()[1], trusted, silence_seconds=silence_seconds))
        return made[-1]

    yield start
    over.set()
    for one in made:
        one.end()
        one.end()
    for thread in threads:
        thread.join()


def sha(data: bytes | bytearray) -> str:
    return hashlib.sha256(data).hexdigest()


def test_lines_and_bytes_in_turns(connect: Connect) -> None:
    """What a line read too much of is not lost, and reads of any length give the bytes in their order."""

    def answer(client: socket.socket, _: threading.Event) -> None:
        while line := client.recv(100):
            client.sendall(b"%d\r\n" % len(BODY) + BODY + line)

    connection = connect(answer)
    lines = connection.makefile("rb")
    for step in (1_000_003, 70_000, 16_384, 999):
        connection.sendall(b"once more\n")
        into = memoryview(bytearray(int(lines.readline())))
        done = take_buffered(lines, into)  # type: ignore[arg-type]
        assert done
        while done < len(into):
            done += connection.recv_into(into[done : done + step])
        assert sha(bytes(into)) == sha(BODY)
        assert lines.readline() == b"once more\n"


def test_silence_has_an_end(connect: Connect) -> None:
    def answer(client: socket.socket, over: threading.Event) -> None:
        client.sendall(b"a")
        over.wait()

    connection = connect(answer, silence_seconds=0.1)
    into = memoryview(bytearray(10))
    assert connection.recv_into(into) == 1
    with pytest.raises(TimeoutError, match=r"no byte came for 0.1 s"):
        connection.recv_into(into)


def test_much_that_is_awaited_comes_in_large_reads_and_the_line_behind_it_at_once(connect: Connect) -> None:
    """Not even the last of it waits for more; the server says nothing after its line."""

    def answer(client: socket.socket, over: threading.Event) -> None:
        for begin in range(0, len(BODY), 10_000):
            client.sendall(BODY[begin : begin + 10_000])
        client.sendall(b"and a line\n")
        over.wait()

    connection = connect(answer)
    lines = connection.makefile("rb")
    into, counts = memoryview(bytearray(len(BODY))), list[int]()
    while (done := sum(counts)) < len(into):
        connection.await_bytes(len(into) - done)
        counts.append(connection.recv_into(into[done:]))
    connection.await_bytes(0)
    assert sha(bytes(into)) == sha(BODY)
    assert lines.readline() == b"and a line\n"
    assert counts[0] >= WAKE_BYTES - 64 * 1024  # of TLS, whole records of what came


@pytest.mark.parametrize("ends", [False, True])
def test_less_than_was_awaited_is_given_all_the_same(connect: Connect, ends: bool) -> None:
    """Where the server falls silent, or ends."""

    def answer(client: socket.socket, over: threading.Event) -> None:
        client.sendall(BODY[:100_000])
        if not ends:
            over.wait()

    connection = connect(answer, silence_seconds=60 if ends else 0.2)
    connection.await_bytes(len(BODY))
    into, done = memoryview(bytearray(len(BODY))), 0
    with pytest.raises(TimeoutError, match=r"no byte came") if not ends else suppress(OSError):
        while count := connection.recv_into(into[done:]):
            done += count
    assert bytes(into[:done]) == BODY[:100_000]


def test_server_that_takes_nothing_has_an_end(connect: Connect) -> None:
    connection = connect(lambda _, over: over.wait() and None, silence_seconds=0.1)
    with pytest.raises(TimeoutError, match=r"no byte was taken for 0.1 s"):
        connection.sendall(bytes(64 * 1024 * 1024))


def test_abort_ends_a_read(connect: Connect) -> None:
    connection = connect(lambda _, over: over.wait() and None)
    aborting = threading.Thread(target=connection.abort)
    aborting.start()
    with suppress(OSError):  # TLS sees that it was cut
        assert connection.recv_into(memoryview(bytearray(10))) == 0
    aborting.join()


def test_the_end_is_seen(connect: Connect) -> None:
    connection = connect(lambda client, _: client.sendall(b"abc"))
    into = memoryview(bytearray(10))
    assert connection.recv_into(into) == 3
    with suppress(OSError):
        assert connection.recv_into(into) == 0


def test_an_answer_that_closes_is_read_to_its_end(connect: Connect) -> None:
    """http.client closes its socket before such an answer is read."""

    def answer(client: socket.socket, _: threading.Event) -> None:
        client.recv(1000)
        client.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(BODY) + BODY)

    connection = connect(answer)
    made = http.client.HTTPConnection("localhost")
    made.sock = connection
    made.request("GET", "/")
    assert sha(made.getresponse().read()) == sha(BODY)
    made.close()

"""A TCP proxy that makes trouble: cuts connections, once or for good, delays requests, answers them itself, is slow."""

from __future__ import annotations

import re
import socket
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Self

_WHOLE = b"HTTP/1.1 200 OK\r\n"
_RANGE = re.compile(rb"GET (\S+) .*^(?:x-ms-)?range: bytes=(\d+)-(\d+)\r$", re.IGNORECASE | re.DOTALL | re.MULTILINE)


class TcpProxy:
    """Forwards to one address. `address` is where it listens; `answered_bytes` counts what came back through it.

    `latency_seconds` passes before what a client sends goes on; `bytes_per_second`, where it is set, is the most that
    each connection answers. Both may be changed at any time. `ranges_are_partial`: an answer with a range that calls
    itself 200 OK becomes 206 OK, as HTTP wants it; that changes no byte count. `here` is this host's address.
    """

    def __init__(
        self, target: str, *, latency_seconds: float = 0.0, ranges_are_partial: bool = False, here: str = "127.0.0.1"
    ) -> None:
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self._asked: list[tuple[bytes, int, int]] = []
        self._listener = socket.create_server((here, 0))
        self.address = f"{here}:{self._listener.getsockname()[1]}"
        self.port = int(self._listener.getsockname()[1])
        self.answered_bytes = 0
        self.latency_seconds = latency_seconds
        self._ranges_are_partial = ranges_are_partial
        self.bytes_per_second = 0.0
        self.cuts = 0
        self.answered_itself = 0
        self._own_answer = b""
        self._own_answers = 0
        self._cut_at: int | None = None
        self._forever = False
        self._only_one = False
        self._meanwhile: Callable[[], None] = lambda: None
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def cut_after(
        self,
        answered_bytes: int,
        *,
        forever: bool = False,
        only_one: bool = False,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> None:
        """Resets all connections once so many more bytes were answered, or `only_one` of them; `forever`: later ones
        at once. Before that `meanwhile` is called.
        """
        self._only_one = only_one
        self._meanwhile = meanwhile
        self._cut_at, self._forever = self.answered_bytes + answered_bytes, forever

    def resumed(self) -> int:
        """How many GETs of a range asked for the rest of an earlier one; a client whose GETs do not overlap."""
        return sum(
            any(path == of and begin < at <= end == last for of, begin, last in self._asked)
            for path, at, end in self._asked
        )

    def answer_next(self, answer: bytes, count: int) -> None:
        """Answers the next requests itself, and closes their connections."""
        with self._lock:
            self._own_answer, self._own_answers = answer, count

    def _answers_itself(self) -> bool:
        with self._lock:
            if not self._own_answers:
                return False
            self._own_answers -= 1
            self.answered_itself += 1
            return True

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                try:
                    far = socket.create_connection(self._target)
                except OSError:  # nobody is there now
                    near.close()
                    continue
                with self._lock:
                    self._open |= {near, far}
                self._threads.append(threading.Thread(target=self._serve, args=(near, far)))
                self._threads[-1].start()

    def _serve(self, near: socket.socket, far: socket.socket) -> None:
        asking = threading.Thread(target=self._forward, args=(near, far, False))
        asking.start()
        self._forward(far, near, True)
        asking.join()
        with self._lock:
            self._open -= {near, far}
            near.close()
            far.close()

    def _forward(self, source: socket.socket, sink: socket.socket, answers: bool) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                if answers:
                    if self._ranges_are_partial and data.startswith(_WHOLE):
                        data = _partial(data)
                    self.answered_bytes += len(data)
                    if self._cut_at is not None and self.answered_bytes >= self._cut_at:
                        self.cuts += 1
                        if not self._forever:
                            self._cut_at = None
                        self._meanwhile()
                        self._reset({source, sink} if self._only_one else None)
                        return
                    if self.bytes_per_second:
                        time.sleep(len(data) / self.bytes_per_second)
                elif self._answers_itself():
                    source.sendall(self._own_answer)
                    break
                else:
                    if asked := _RANGE.search(data):
                        self._asked.append((asked[1], int(asked[2]), int(asked[3])))
                    if self.latency_seconds:
                        time.sleep(self.latency_seconds)
                sink.sendall(data)
        with self._lock:
            for one in (source, sink):
                with suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)

    def _reset(self, ones: set[socket.socket] | None = None) -> None:
        with self._lock:
            chosen = self._open if ones is None else ones
            for one in chosen:
                with suppress(OSError):
                    one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    one.shutdown(socket.SHUT_RDWR)
                one.close()
            self._open = self._open - chosen

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._reset()
        for thread in self._threads:
            thread.join()


def _partial(data: bytes) -> bytes:
    """An answer's beginning; a server sends a head of less than a packet in one piece."""
    head = data.split(b"\r\n\r\n", 1)[0]
    return data.replace(b"200", b"206", 1) if b"\r\nContent-Range:" in head else data

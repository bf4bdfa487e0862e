"""A TCP proxy that cuts connections, once or for good."""

from __future__ import annotations

import socket
import struct
import threading
from contextlib import suppress
from types import TracebackType
from typing import Self


class TcpProxy:
    """Forwards to one address. `address` is where it listens; `answered_bytes` counts what came back through it."""

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.answered_bytes = 0
        self.cuts = 0
        self._cut_at: int | None = None
        self._forever = False
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def cut_after(self, answered_bytes: int, *, forever: bool = False) -> None:
        """Resets all connections once so many more bytes were answered; `forever`: later ones at once."""
        self._cut_at, self._forever = self.answered_bytes + answered_bytes, forever

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(self._target)
                with self._lock:
                    self._open |= {near, far}
                for source, sink, answers in ((near, far, False), (far, near, True)):
                    thread = threading.Thread(target=self._forward, args=(source, sink, answers))
                    self._threads.append(thread)
                    thread.start()

    def _forward(self, source: socket.socket, sink: socket.socket, answers: bool) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                if answers:
                    self.answered_bytes += len(data)
                    if self._cut_at is not None and self.answered_bytes >= self._cut_at:
                        self.cuts += 1
                        if not self._forever:
                            self._cut_at = None
                        break
                sink.sendall(data)
        self._reset()

    def _reset(self) -> None:
        with self._lock:
            for one in self._open:
                with suppress(OSError):
                    one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    one.shutdown(socket.SHUT_RDWR)
                one.close()
            self._open.clear()

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

"""A stream that nobody takes ends; it would hold a thread for as long as its client stays."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from mxserver.calls import StalledStreams

CHUNK = bytes(1024 * 1024)


class Streams:
    """A server of endless streams, and of one that has nothing to say."""

    def __init__(self, stalled: StalledStreams) -> None:
        self.ended, self.over = threading.Semaphore(0), threading.Event()
        self._server = grpc.server(ThreadPoolExecutor(4), interceptors=[stalled])
        methods = {"Endless": self._endless, "Silent": self._silent}
        handlers = {name: grpc.unary_stream_rpc_method_handler(method) for name, method in methods.items()}
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("streams", handlers),))
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def _endless(self, request: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        try:
            while True:
                yield CHUNK
        finally:
            self.ended.release()

    def _silent(self, request: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        yield b"first"
        self.over.wait(60)
        yield b"last"

    def stop(self) -> None:
        self._server.stop(0).wait()


@pytest.fixture
def streams() -> Iterator[Streams]:
    stalled = StalledStreams(0.2)
    running = Streams(stalled)
    stalled.start()
    yield running
    running.stop()
    stalled.stop()


def test_a_stream_that_nobody_takes_ends_and_one_that_waits_goes_on(streams: Streams) -> None:
    with grpc.insecure_channel(streams.address) as channel:
        silent = channel.unary_stream("/streams/Silent")(b"")
        assert next(silent) == b"first"
        endless = channel.unary_stream("/streams/Endless")(b"")
        assert next(endless) == CHUNK
        assert streams.ended.acquire(timeout=60)  # its thread is free
        with pytest.raises(grpc.RpcError) as ended:
            list(endless)
        assert ended.value.code() is grpc.StatusCode.CANCELLED
        streams.over.set()
        assert list(silent) == [b"last"]

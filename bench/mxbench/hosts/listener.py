"""The port at which an agent waits: `mx bench peer --listen`, and the pods of `mx bench cluster --manifest`."""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import suppress

from mxbench.hosts.agent import serve
from mxbench.hosts.channel import over_socket
from mxbench.hosts.errors import HostError

__all__ = ["DEFAULT_PORT", "finish", "listen"]

DEFAULT_PORT = 6570


def finish(host: str, port: int) -> None:
    """Ends a `listen` there that waits for this. Does nothing where nobody listens."""
    with suppress(HostError):
        channel = over_socket(host, port)
        channel.send(do="finish")
        channel.close()


def listen(
    address: str,
    port: int,
    say: Callable[[str], None],
    *,
    connections: int | None = None,
    until_finished: bool = False,
) -> None:
    """Serves one connection after the other: all (None), or so many, or until `finish`. Raises HostError where the port
    is taken.

    Whoever reaches the port can start the benches' processes here: for networks that you trust.
    """
    try:
        server = socket.create_server((address, port), reuse_port=False)
    except OSError as error:
        raise HostError(f"{address or '*'}:{port} cannot be listened at: {error.strerror}") from error
    with server:
        say(f"listening on {address or '*'}:{server.getsockname()[1]}")
        while connections is None or connections > 0:
            connection, (host, *_) = server.accept()
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # of a machine that vanished
            say(f"{host} is connected")
            finished = False
            with (
                suppress(OSError),  # at the end answers are flushed, and whoever asked may be gone
                connection,
                connection.makefile("rb") as requests,
                connection.makefile("wb") as answers,
            ):
                finished = serve(requests, answers)
            say(f"{host} has left")
            if finished and until_finished:
                return
            if connections is not None:
                connections -= 1

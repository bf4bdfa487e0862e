"""What both ways of bringing a file give: its bytes in pieces, and failures with a status of gRPC."""

from __future__ import annotations

from typing import NamedTuple

import grpc

FILES_FOLDER = "/files/"
BLOCK_BYTES = 1024 * 1024
MOST_DIGESTED_BYTES = 8 * 1024 * 1024
"""The longest stretch of a file by HTTP of which the server tells a digest; each ends at a multiple of it."""
DIGEST_OF_LAST = "xxh3-64"
"""The chunk extension with the digest of the chunk before."""


class FilesPlace(NamedTuple):
    """Where a server has a model's files by HTTP: a port on its host, and their folder there, "/" at its end."""

    port: int
    path: str


class Piece(NamedTuple):
    """Bytes of a file, and their XXH3-64 as the server read them; None where it tells none. `received` is that of the
    bytes as they are here, where it was made when they came.
    """

    path: str
    offset: int
    data: memoryview
    digest: int | None
    received: int | None = None


class CallFailed(grpc.RpcError):
    """A request for bytes ended early. It has the interface of grpcio's own errors."""

    def __init__(self, status: grpc.StatusCode, details: str) -> None:
        super().__init__(f"{status.name}: {details}")
        self._status = status
        self._details = details

    def code(self) -> grpc.StatusCode:
        return self._status

    def details(self) -> str:
        return self._details

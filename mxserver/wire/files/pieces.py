"""What both ways of bringing a file give: its bytes in pieces, and failures with a status of gRPC."""

from __future__ import annotations

from typing import NamedTuple

import grpc

FILES_FOLDER = "/files/"
BLOCK_BYTES = 1024 * 1024
MOST_DIGESTED_BYTES = 8 * 1024 * 1024
"""The longest range by HTTP of which the server tells a digest."""


class FilesPlace(NamedTuple):
    """Where a server has a model's files by HTTP: a port on its host, and their folder there, "/" at its end."""

    port: int
    path: str


class Piece(NamedTuple):
    """Bytes of a file, and their XXH3-64 as the server read them; None where it tells none."""

    path: str
    offset: int
    data: memoryview
    digest: int | None


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

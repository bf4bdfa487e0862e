"""The rung `published` of an update: what a trainer, or any other process, publishes (`mxcore.publish`)."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple

import torch

from mxcore.engine.context import LoadContext
from mxcore.engine.loaded import Loaded, Stored, load_stored
from mxcore.engine.protocol import Streamed
from mxcore.exchange import fetch
from mxcore.load_ladder import PollResult, Rung, skip, take
from mxcore.storage.checkpoint import DTYPES, Checkpoint, TensorInfo
from mxcore.storage.plan import Progress
from mxserver.wire.proto import load_pb2

__all__ = ["Publication", "PublishedRung"]

_WAIT_SECONDS = 5.0
_CODES = {dtype.torch_name: code for code, dtype in DTYPES.items() if dtype.torch_name}


class Publication(NamedTuple):
    """What is published under a name and a version, by the names of a checkpoint. Its bytes never change."""

    name: str
    version: str


class PublishedRung(Rung[Loaded]):
    """Fetched whole into host memory, each byte verified, before anything of it is used."""

    name = "published"

    def __init__(self, context: LoadContext, publication: Publication, digest: str) -> None:
        self._context = context
        self._publication = publication
        self._digest = digest

    def poll(self) -> PollResult:
        """Taken where there is a server: who publishes is seen while it is fetched."""
        if self._context.settings.server_address is None:
            return skip("no server is set")
        return take(f"version {self._publication.version} of {self._publication.name!r}")

    def load(self) -> Loaded:
        """A model with these weights; raises what `fetch` raises, and what building a model raises."""
        return load_stored(self._context, "published", load_pb2.LOAD_PATH_PEER_TCP, self._stored, reading_alone=False)

    def _stored(self, progress: Progress) -> Stored:
        settings = self._context.settings
        given = {"transport": settings.transport, "stall_timeout_seconds": settings.stall_timeout_seconds}
        fetched: Mapping[str, torch.Tensor] = fetch(
            self._publication.name,
            self._publication.version,
            wait_seconds=_WAIT_SECONDS,
            framework="torch",
            progress=progress,
            server=settings.server_address,
            settings={**given, **({"worker_host": settings.worker_host} if settings.worker_host else {})},
        )
        checkpoint = Checkpoint((), {name: _info(name, tensor) for name, tensor in fetched.items()})

        def tensors(names: Collection[str] | None, told: Progress) -> Iterator[tuple[str, torch.Tensor]]:
            for name, tensor in fetched.items():
                if names is None or name in names:
                    yield name, tensor
            told(checkpoint.total_bytes, checkpoint.total_bytes)

        return Stored(Streamed(checkpoint, tensors), lambda: self._digest)


def _info(name: str, tensor: torch.Tensor) -> TensorInfo:
    code = _CODES[str(tensor.dtype).removeprefix("torch.")]
    return TensorInfo(name, code, tuple(tensor.shape), 0, 0, tensor.nbytes)

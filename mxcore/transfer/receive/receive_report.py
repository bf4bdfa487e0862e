"""What a receive did."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from mxcore.transfer.layout import ChunkDigests, Scalars
from mxcore.transfer.receive.load_progress import LoadStep, peer_path

__all__ = ["ReceiveReport"]


@dataclass(frozen=True)
class ReceiveReport:
    """What `receive` did. With its `digests`, serving needs no second pass over the memory.

    `source_worker_id`, `operation` and `transport` are those of the holder that gave most; `bytes_from` has all.
    `bytes_again` were asked for more than once, because a holder was lost. `seconds` are those of the whole receive,
    `moving_seconds` from the first chunk asked for to the last one verified: the rest is connecting and registering.
    `bytes_otherwise` came from elsewhere: see `PartialReceive`. `in_clear`: some came over a network in clear although
    this worker has certificates.
    """

    bytes: int
    tensors: int
    chunks_verified: int
    seconds: float
    source_worker_id: str
    operation: str
    transport: str
    scalars: Scalars
    digests: ChunkDigests = field(repr=False)
    failures: tuple[str, ...] = ()
    bytes_from: Mapping[str, int] = field(default_factory=dict)
    bytes_again: int = 0
    moving_seconds: float = 0.0
    bytes_otherwise: int = 0
    in_clear: bool = False

    def tell(self, step: LoadStep) -> None:
        """Has the server told of it, as the step of a load that has ended."""
        path, source = peer_path(self.transport), self.source_worker_id
        step.ended(path, self.bytes, self.seconds, source, self.chunks_verified, self.bytes_from)

    @property
    def gigabytes_per_second(self) -> float:
        """10^9 bytes a second, from the first call to the last verified chunk."""
        return self.bytes / self.seconds / 1e9 if self.seconds > 0 else 0.0

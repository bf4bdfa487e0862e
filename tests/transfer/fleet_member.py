"""A worker of this process: a membership, and memory for a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mxcore.settings import load_settings
from mxcore.transfer.layout import build_layout
from mxcore.transfer.member import Membership
from mxcore.transfer.move import Source
from mxcore.transfer.receive import ReceiveReport
from tests.transfer.memory import HostTensors, identity, model_specs

SEED = 7
CHUNK_BYTES = 65536
PATIENT_SECONDS = 20  # nobody stalls on a busy machine; tests of stalls say so


class Member:
    """A membership with memory for a model; `seed` None: to be received."""

    def __init__(self, server: str, seed: int | None, megabytes: int, **changes: Any) -> None:
        names = {"MX_SERVER_ADDRESS": server, "MX_WORKER_GRPC_PORT": 0, "MX_TRANSPORT": "tcp"}
        names |= {"MX_SERVER_TIMEOUT_SECS": 60, "MX_DRAIN_TIMEOUT_SECS": 5, "MX_STALL_TIMEOUT_SECS": PATIENT_SECONDS}
        names |= {"MX_HEARTBEAT_INTERVAL_SECS": 0.2}
        self.membership = Membership(
            load_settings({**names, **changes}, {}), identity(), 0, "cpu", chunk_bytes=CHUNK_BYTES
        )
        self.tensors = HostTensors(model_specs(megabytes), seed)
        self.layout, self.placement = build_layout("raw", self.tensors.local_tensors())

    def serve(self, report: ReceiveReport | None = None) -> Source:
        digests = report.digests if report else None
        self.membership.serve(self.layout, self.placement, {}, digests, keep_alive=self.tensors)
        return Source(self.membership.source_id, self.membership.worker_id, 0, self.membership.endpoint or "")

    def receive(self, sources: list[Source], progress: Callable[[int, int], None] | None = None) -> ReceiveReport:
        return self.membership.receive(self.layout, self.placement, {}, sources, progress, relay_from=self.tensors)

    @property
    def is_right(self) -> bool:
        return self.tensors.equal_bytes(HostTensors(self.tensors.specs, SEED))


NewMember = Callable[..., Member]

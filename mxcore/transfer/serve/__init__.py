"""Serving weights to other workers, under leases, complete or while they are still received."""

from __future__ import annotations

from mxcore.transfer.serve.chunk_listener import ChunkListener
from mxcore.transfer.serve.holder import LEASE_SECONDS, Holder
from mxcore.transfer.serve.origin import Origin
from mxcore.transfer.serve.relay import ServedRelay
from mxcore.transfer.serve.self_check import SelfCheck
from mxcore.transfer.serve.worker_identity import WorkerIdentity
from mxcore.transfer.serve.worker_service import WorkerServer

__all__ = [
    "LEASE_SECONDS",
    "ChunkListener",
    "Holder",
    "Origin",
    "SelfCheck",
    "ServedRelay",
    "WorkerIdentity",
    "WorkerServer",
]

"""Metrics of an engine's workers: counted in files that outlive a rank, served for all ranks by one process"""

from __future__ import annotations

from mxcore.metrics.families import (
    CHUNKS_VERIFIED,
    EXPORTED,
    FAMILIES,
    GIVEN_BYTES,
    LEASES,
    LEASES_NOW,
    LOAD_SECONDS,
    LOADS,
    PHASE_SECONDS,
    RECEIVED_BYTES,
    REFUSALS,
    SELF_CHECK_SECONDS,
    SELF_CHECKED,
    SELF_CHECKED_WRONG,
    SERVING,
    STRAGGLERS,
    WRONG_CHUNKS,
)
from mxcore.metrics.recording import Family
from mxcore.metrics.starting import start

__all__ = [
    "CHUNKS_VERIFIED",
    "EXPORTED",
    "FAMILIES",
    "GIVEN_BYTES",
    "LEASES",
    "LEASES_NOW",
    "LOADS",
    "LOAD_SECONDS",
    "PHASE_SECONDS",
    "RECEIVED_BYTES",
    "REFUSALS",
    "SELF_CHECKED",
    "SELF_CHECKED_WRONG",
    "SELF_CHECK_SECONDS",
    "SERVING",
    "STRAGGLERS",
    "WRONG_CHUNKS",
    "Family",
    "start",
]

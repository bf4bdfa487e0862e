"""Who has what: records of workers, their epochs and their leases, behind one interface."""

from __future__ import annotations

from mxserver.store.clock import Clock, HeardClock, SystemClock
from mxserver.store.errors import NotOwner, StoreEnded, StoreFull, StoreUnavailable, UnknownRecord
from mxserver.store.index import require_epoch, require_owner
from mxserver.store.interface import Leases, Publication, Query, RecordKey, SourceRecord, SourceStore, Status
from mxserver.store.memory import MemoryStore
from mxserver.store.sqlite import SqliteStore
from mxserver.store.stored_amount import small_part
from mxserver.store.turns import LEASE_SECONDS, MemoryTurns, Turn, Turns

__all__ = [
    "LEASE_SECONDS",
    "Clock",
    "HeardClock",
    "Leases",
    "MemoryStore",
    "MemoryTurns",
    "NotOwner",
    "Publication",
    "Query",
    "RecordKey",
    "SourceRecord",
    "SourceStore",
    "SqliteStore",
    "Status",
    "StoreEnded",
    "StoreFull",
    "StoreUnavailable",
    "SystemClock",
    "Turn",
    "Turns",
    "UnknownRecord",
    "require_epoch",
    "require_owner",
    "small_part",
]

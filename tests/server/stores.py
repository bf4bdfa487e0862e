"""What the tests of stores share: a clock that is turned by hand, and publications."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mxserver.limits import DEFAULT
from mxserver.store import Leases, MemoryStore, Publication, RecordKey, SourceStore, SqliteStore
from mxserver.store.redis import RedisStore
from mxserver.wire.proto import p2p_pb2
from tests.server.redis_process import shared_redis

INITIALIZING = p2p_pb2.SOURCE_STATUS_INITIALIZING
READY = p2p_pb2.SOURCE_STATUS_READY
STALE = p2p_pb2.SOURCE_STATUS_STALE

HEARTBEAT_SECONDS = 90.0
COLLECT_SECONDS = 3600.0
LEASES = Leases(HEARTBEAT_SECONDS, COLLECT_SECONDS)


class HandClock:
    """Both clocks of a server, turned by hand."""

    def __init__(self) -> None:
        self.seconds = 1000.0
        self.unix_start_ms = 1_700_000_000_000

    def advance(self, seconds: float) -> None:
        self.seconds += seconds

    def monotonic_seconds(self) -> float:
        return self.seconds

    def unix_ms(self) -> int:
        return self.unix_start_ms + round(self.seconds * 1000)


@dataclass(frozen=True)
class StoreKind:
    """A store to run the contract against."""

    name: str
    lasting: bool
    open: Callable[..., SourceStore]  # folder, clock and limits


KINDS = (
    StoreKind("memory", False, lambda folder, clock, limits=DEFAULT: MemoryStore(LEASES, clock, limits)),
    StoreKind(
        "redis",
        True,
        lambda folder, clock, limits=DEFAULT: RedisStore(
            shared_redis().url, LEASES, clock, prefix=f"{folder}:", linger_seconds=0.0, limits=limits
        ),
    ),
    StoreKind(
        "sqlite",
        True,
        lambda folder, clock, limits=DEFAULT: SqliteStore(folder / "state.sqlite3", LEASES, clock, limits),
    ),
)


def key(worker: str = "w0", rank: int = 0, source: str = "0123456789abcdef") -> RecordKey:
    return RecordKey(source, worker, rank)


def publication(
    record_key: RecordKey | None = None,
    *,
    model_name: str = "Org/Model",
    status: p2p_pb2.SourceStatus.ValueType = p2p_pb2.SOURCE_STATUS_UNKNOWN,
    epoch: int = 0,
    nixl_metadata: bytes = b"agent",
    owner: str = "",
) -> Publication:
    record_key = record_key or key()
    worker = p2p_pb2.WorkerMetadata(
        worker_rank=record_key.worker_rank,
        nixl_metadata=nixl_metadata,
        accelerator="cuda",
        topology={"zone": "a"},
    )
    return Publication(
        key=record_key,
        identity=p2p_pb2.SourceIdentity(model_name=model_name).SerializeToString(),
        worker=worker.SerializeToString(),
        model_name=model_name,
        accelerator="cuda",
        topology={"zone": "a"},
        status=status,
        epoch=epoch,
        owner=owner,
    )

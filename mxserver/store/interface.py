"""The interface of all stores, and the records that go in and out.

Rules that every store holds (tests/server/store_contract.py runs them against each):

- A publish makes or replaces the record of (source, worker, rank) and gets an epoch that is greater than all before
  it, also across restarts. A publish without an epoch (0) begins a new life of the worker; one that carries an epoch
  continues the life that got this epoch. A publish or an update that carries an epoch of an earlier life is refused,
  and so is one above the record's last, which was not given to it. Any other is accepted, because the answer with the
  newest one may have been lost.
- Where callers are known (`owner`), a record belongs to the caller that published it: nobody else changes it.
- A publish without a status keeps the status of a record that is alive, and is INITIALIZING otherwise.
- A record without a sign of life for `Leases.heartbeat_seconds` is STALE, whatever its status was; one that was STALE
  for `Leases.collect_seconds` is gone. Both hold at once for every reader; `sweep` only writes them down.
- Records, those of one worker, and the bytes of all are limited (mxserver/limits.py). What renews, ends or replaces a
  record by no larger one always goes.
- What was acknowledged is kept. A repeated status only renews the lease: it is not written anywhere.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from mxserver.store.turns import Turns
from mxserver.wire.proto import p2p_pb2

Status: TypeAlias = p2p_pb2.SourceStatus.ValueType


class RecordKey(NamedTuple):
    """The key of a record."""

    source_id: str
    worker_id: str
    worker_rank: int


class Leases(NamedTuple):
    """How long records live without a sign of life."""

    heartbeat_seconds: float = 90.0
    collect_seconds: float = 3600.0


@dataclass(frozen=True, slots=True)
class SourceRecord:
    """One worker's record at one moment."""

    key: RecordKey
    status: Status
    epoch: int
    life: int  # the epoch with which this life of the worker began
    updated_at_ms: int
    identity: bytes  # SourceIdentity, serialised
    worker: bytes  # WorkerMetadata as it was published; its status and updated_at count no more
    model_name: str
    accelerator: str
    topology: Mapping[str, str]
    endpoint: str = ""  # of its gRPC services, while it serves
    source_load: float | None = None
    owner: str = ""  # who published it; empty: callers were not identified then
    payload_bytes: int = 0  # of identity and worker together, as published
    worker_is_cut: bool = False  # `worker` has only record.proto's WorkerFacts; `SourceStore.whole_worker` has all


@dataclass(frozen=True, slots=True)
class Publication:
    """What a worker publishes."""

    key: RecordKey
    identity: bytes
    worker: bytes
    model_name: str
    accelerator: str
    topology: Mapping[str, str]
    endpoint: str = ""
    status: Status = p2p_pb2.SOURCE_STATUS_UNKNOWN
    epoch: int = 0
    owner: str = ""


@dataclass(frozen=True, slots=True)
class Query:
    """Filters of a search; all that are set must fit."""

    source_id: str | None = None
    model_name: str | None = None  # in any case, as in the source id
    status: Status | None = None
    worker_rank: int | None = None
    min_updated_at_ms: int | None = None
    limit: int | None = None


class SourceStore(ABC):
    """Keeps the records of workers. All methods are safe from any thread.

    Every method but `close` raises StoreUnavailable when the store does not work; then nothing was changed, unless the
    error says that this is not known.
    """

    turns: Turns
    """Whose turn it is to read storage: for all servers over this store."""

    @abstractmethod
    def publish(self, publication: Publication) -> SourceRecord:
        """Makes or replaces a record, and returns it with its new epoch once it is kept.

        Raises:
            StaleEpoch: the publication's epoch is of an earlier life.
            NotOwner: the record is somebody else's.
            StoreFull: a limit does not allow it.
        """

    @abstractmethod
    def update_status(
        self, key: RecordKey, status: Status, *, epoch: int = 0, source_load: float | None = None, owner: str = ""
    ) -> None:
        """Sets the status and renews the lease (STALE renews nothing: it is a goodbye).

        Raises:
            UnknownRecord: there is no such record.
            StaleEpoch: the epoch is of an earlier life.
            NotOwner: the record is somebody else's.
        """

    @abstractmethod
    def get(self, source_id: str, worker_id: str) -> SourceRecord | None:
        """The worker's record; of several ranks under one worker id, the lowest. Large metadata is cut as in `find`."""

    @abstractmethod
    def whole_worker(self, record: SourceRecord) -> bytes | None:
        """The metadata that this record was published with; None where the record has changed since."""

    @abstractmethod
    def find(self, query: Query) -> list[SourceRecord]:
        """The records that fit, newest sign of life first; large metadata is cut (`worker_is_cut`)."""

    @abstractmethod
    def sweep(self) -> tuple[int, int]:
        """Writes down what time has changed. Returns how many records became STALE, and how many were deleted."""

    @abstractmethod
    def check(self) -> None:
        """Raises StoreUnavailable while the store does not work; StoreEnded when it will not work again.

        A disk that is slow is none of that, until it has not answered for as long as callers wait.
        """

    def waits_for_disk(self, key: RecordKey, status: Status) -> bool:
        """Whether an update to this status would wait for a disk. Only a guess: the record may change meanwhile."""
        return False

    @abstractmethod
    def close(self) -> None:
        """Finishes running changes and releases the store. Idempotent; later calls raise StoreUnavailable."""
